// SPDX-License-Identifier: Apache-2.0
// The module madtp_kernels._C. It knows nothing of torch: tensors arrive as addresses, sizes and strides.

#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "build_config.h"
#include "cpu/isa.h"
#include "madtp/version.h"
#include "python/common.h"

namespace madtp::python {

// One function per op family, defined in the file of that name. cuda is null in a build without CUDA.
void bind_attention(py::module_& cpu);
void bind_attention_rows(py::module_& cpu);
void bind_quantized(py::module_& cpu, py::module_* cuda);
void bind_sparse24(py::module_& cpu, py::module_* cuda);
void bind_tokens(py::module_& cpu, py::module_* cuda);

void check(Status status, const char* function) {
  if (status == Status::ok) return;
  if (status == Status::unsupported && !cpu::isa_choice().error.empty())
    throw py::value_error(cpu::isa_choice().error);
  throw std::runtime_error(std::string(function) + ": " + to_string(status));
}

namespace {

std::vector<std::string> names(const std::vector<cpu::Isa>& isas) {
  std::vector<std::string> result;
  for (cpu::Isa isa : isas) result.emplace_back(cpu::to_string(isa));
  return result;
}

std::vector<std::string> split(const std::string& list) {
  std::vector<std::string> items;
  std::istringstream stream(list);
  for (std::string item; std::getline(stream, item, ';');) items.push_back(item);
  return items;
}

py::object text_or_none(const std::string& text) {
  return text.empty() ? py::none() : py::object(py::str(text));
}

py::dict build_info() {
  py::dict info;
  info["version"] = MADTP_VERSION;
  info["compiler"] = MADTP_COMPILER;
  info["cuda"] = text_or_none(MADTP_CUDA_VERSION);
  info["cuda_archs"] = split(MADTP_CUDA_ARCHS);
  info["cuda_missing"] = text_or_none(MADTP_CUDA_MISSING);
  info["cpu_isas"] = names(cpu::compiled_isas());
  info["openmp"] = bool(MADTP_HAS_OPENMP);
  return info;
}

std::string isa() {
  const cpu::IsaChoice& choice = cpu::isa_choice();
  if (!choice.error.empty()) throw py::value_error(choice.error);
  return cpu::to_string(choice.isa);
}

}  // namespace
}  // namespace madtp::python

PYBIND11_MODULE(_C, module) {
  using namespace madtp::python;
  module.doc() = "The C++ and CUDA kernels of madtp_kernels, called with addresses.";
  module.def("build_info", &build_info,
             "What was compiled: version, compiler, CUDA, instruction sets, OpenMP.");

  py::module_ cpu = module.def_submodule("cpu");
  cpu.def("isa", &isa,
          "The instruction set in use. Raises ValueError when MADTP_CPU_ISA cannot be honoured.");
  cpu.def(
      "available_isas", [] { return names(madtp::cpu::available_isas()); },
      "What MADTP_CPU_ISA may name here.");

#if MADTP_HAS_CUDA
  py::module_ cuda_module = module.def_submodule("cuda");
  py::module_* cuda = &cuda_module;
#else
  py::module_* cuda = nullptr;
#endif
  bind_attention(cpu);
  bind_attention_rows(cpu);
  bind_quantized(cpu, cuda);
  bind_sparse24(cpu, cuda);
  bind_tokens(cpu, cuda);
}
