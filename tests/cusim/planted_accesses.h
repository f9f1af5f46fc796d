// Kernels of planted_accesses.cu, of one warp each.

#pragma once

void launch_planted(const float* from, int stride, float* to);
