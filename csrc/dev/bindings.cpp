// moe_ext_dev: the CUDA kernels as tests/cusim runs them on the CPU, for tests; not shipped.
//
// Importing it after moe_ext puts the emulated kernels in the place of the CPU operators. The
// module sets the order in which their threads run, and tells what was launched.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cusim.h"

namespace py = pybind11;

namespace {

// {bytes of one access: how many}
py::dict by_size(const cusim::Accesses& accesses) {
  py::dict sizes;
  for (std::size_t i = 0; i < accesses.size(); ++i) {
    if (accesses[i]) sizes[py::int_(1 << i)] = accesses[i];
  }
  return sizes;
}

py::list take_launches() {
  py::list taken;
  for (const cusim::Launch& launch : cusim::launches()) {
    taken.append(py::dict(
        py::arg("kernel") = launch.name, py::arg("blocks") = launch.blocks,
        py::arg("threads") = launch.threads, py::arg("shared_bytes") = launch.shared_bytes,
        py::arg("loads") = by_size(launch.loads), py::arg("stores") = by_size(launch.stores)));
  }
  cusim::launches().clear();
  return taken;
}

}  // namespace

PYBIND11_MODULE(moe_ext_dev, m) {
  m.doc() = "The CUDA kernels, run on the CPU.";
  m.def("set_order", &cusim::set_order, py::arg("order"),
        "The turns of threads and blocks: forward, reverse, or random<seed>.");
  m.def(
      "record", [](bool on) { cusim::options().recording = on; }, py::arg("on"),
      "Whether launches are kept for take_launches.");
  m.def("take_launches", &take_launches,
        "The launches recorded since the last call: kernel, blocks, threads, shared_bytes, and the "
        "loads and stores of global memory as {bytes: count}.");
}
