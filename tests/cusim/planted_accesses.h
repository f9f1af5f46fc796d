// Kernels of planted_accesses.cu, of one warp each.

#pragma once

namespace planted {

void read(const float* from, int stride, float* to);
void share(int stride, float* to);
void past(const float* from, float* to);

}  // namespace planted
