// The export list: what Python sees of the core.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "build_info.h"
#include "model_update.h"
#include "plan.h"
#include "python_refs.h"
#include "slot_watch.h"
#include "torch_doors.h"
#include "update_cpu.h"
#ifdef EMA_FUSED_HAVE_CUDA
#include "update_cuda.cuh"
#endif

namespace py = pybind11;
using namespace ema_fused;

namespace {

// (devices the runtime counts, its reason where there are none)
std::pair<int, std::string> cuda_devices() {
#ifdef EMA_FUSED_HAVE_CUDA
  const cuda::DeviceReport report = cuda::devices();
  return {report.count, report.why_none};
#else
  return {0, "built without CUDA"};
#endif
}

std::string why_not_on_cuda([[maybe_unused]] int device) {
#ifdef EMA_FUSED_HAVE_CUDA
  return cuda::why_not_on(device);
#else
  return "built without CUDA";
#endif
}

// The weights of several averages: (number, address, is it a float64 there); no address: the
// number.
using PlainWeight = std::tuple<double, std::uintptr_t, bool>;

// Where a distance is put: (address, averages, parts of each).
using PlainPartials = std::tuple<std::uintptr_t, std::int64_t, std::int64_t>;

// Addresses are integers in Python; 0: none.
template <typename T>
const T* pointer(std::uintptr_t address) {
  return reinterpret_cast<const T*>(address);
}

bool run_with(Plan& plan, Operation operation, double weight,
              const std::vector<PlainWeight>& weights_by_average,
              std::vector<double> weights_by_pair, std::uintptr_t found_inf, std::uint64_t seed,
              std::int64_t step, std::uintptr_t step_at, const PlainPartials& partials) {
  LaunchOptions options;
  for (const auto& [number, address, is_float64] : weights_by_average) {
    options.weights_by_average.push_back({number, pointer<void>(address), is_float64});
  }
  options.weights_by_pair = std::move(weights_by_pair);
  options.found_inf = pointer<float>(found_inf);
  options.seed = seed;
  options.step = step;
  options.step_at = pointer<std::int64_t>(step_at);
  const auto& [sums, averages, count] = partials;
  options.partials = {reinterpret_cast<double*>(sums), averages, count};
  const Turn turn = plan.take_turn();
  return plan.run(operation, weight, options);
}

// A method of a plan, in this thread's turn.
template <typename Result, typename... Arguments>
auto in_turn(Result (Plan::*method)(Arguments...)) {
  return [method](Plan& plan, Arguments... arguments) {
    const Turn turn = plan.take_turn();
    return (plan.*method)(arguments...);
  };
}
template <typename Result>
auto in_turn(Result (Plan::*method)() const) {
  return [method](Plan& plan) {
    const Turn turn = plan.take_turn();
    return (plan.*method)();
  };
}

// For tests of the address arithmetic: the table of pairs that need not exist.
// pairs: (averaged address, source address, elements, averaged dtype code, source dtype code)
using PlainPair = std::tuple<std::uintptr_t, std::uintptr_t, std::int64_t, int, int>;
using PlainChunk = std::tuple<std::uintptr_t, std::uintptr_t, std::uint32_t, std::uint32_t>;

std::vector<Pair> as_pairs(const std::vector<PlainPair>& plain) {
  std::vector<Pair> pairs;
  for (const auto& [averaged, source, count, averaged_dtype, source_dtype] : plain) {
    Pair pair{};
    pair.averaged = reinterpret_cast<void*>(averaged);
    pair.source = reinterpret_cast<void*>(source);
    pair.count = count;
    pair.averaged_dtype = static_cast<DType>(averaged_dtype);
    pair.source_dtype = static_cast<DType>(source_dtype);
    pair.index = pair.number = static_cast<std::uint32_t>(pairs.size());
    pairs.push_back(pair);
  }
  return pairs;
}

std::vector<PlainChunk> chunk_table(const std::vector<PlainPair>& plain, std::int64_t elements) {
  std::vector<PlainChunk> table;
  for (const Chunk& chunk : build_chunks(as_pairs(plain), elements).entries) {
    table.emplace_back(reinterpret_cast<std::uintptr_t>(chunk.averaged),
                       reinterpret_cast<std::uintptr_t>(chunk.source), chunk.count, chunk.pair);
  }
  return table;
}

}  // namespace

// Free-threaded Python may run it without the GIL: plans take turns, what watches dictionaries has
// a mutex, and the rest is read alone once connect() has returned.
PYBIND11_MODULE(_C, module, py::mod_gil_not_used()) {
  static PyObject* overlap_error =
      PyErr_NewException("ema_fused._C.OverlapError", PyExc_ValueError, nullptr);
  module.attr("OverlapError") = py::handle(overlap_error);
  py::register_exception_translator([](std::exception_ptr pointer) {
    try {
      std::rethrow_exception(pointer);
    } catch (const OverlapError& error) {
      PyErr_SetObject(overlap_error, py::make_tuple(error.first, error.second, error.what).ptr());
    } catch (const PythonError&) {
      // Its exception is set already, if the function that failed has kept to its contract.
      if (PyErr_Occurred() == nullptr) {
        PyErr_SetString(PyExc_RuntimeError, "a call into Python or torch failed without a reason");
      }
    }
  });

  py::enum_<Operation>(module, "Operation")
      .value("AVERAGE", Operation::kAverage)
      .value("COPY", Operation::kCopy)
      .value("SWAP", Operation::kSwap);
  py::enum_<Arithmetic>(module, "Arithmetic")
      .value("LERP", Arithmetic::kLerp)
      .value("AXPBY", Arithmetic::kAxpby)
      .value("DELTA", Arithmetic::kDelta)
      .value("PRODUCTS", Arithmetic::kProducts)
      .value("STOCHASTIC", Arithmetic::kStochastic);

  module.def(
      "connect",
      [](const py::type& tensor_type, const py::type& parameter_type, const std::string& library,
         const py::object& make_handles) {
        torch_doors::connect(tensor_type.ptr(), parameter_type.ptr(), library, make_handles.ptr());
      },
      py::arg("tensor_type"), py::arg("parameter_type"), py::arg("library"),
      py::arg("make_handles").none(true));
  module.def("missing_doors", &torch_doors::missing);
  module.def("build_info", &build_info);
  module.def("cpu_isa", [] { return cpu_kernel().isa; });
  module.def("cuda_devices", &cuda_devices);
  module.def("why_not_on_cuda", &why_not_on_cuda, py::arg("device"));
  module.attr("CHUNK_ELEMENTS_CPU") = kChunkElementsCpu;
  module.attr("MAX_AVERAGES") = kMaxAverages;
  module.def("chunk_table", &chunk_table, py::arg("pairs"), py::arg("chunk_elements"));

  module.def(
      "inspect",
      [](const py::list& averaged, const py::list& source) {
        Inspection result = inspect(averaged.ptr(), source.ptr());
        return std::make_pair(std::move(result.refusals), std::move(result.devices));
      },
      py::arg("averaged"), py::arg("source"));

  py::class_<SlotWatch>(module, "SlotWatch")
      .def(py::init([](const py::list& dictionaries, const py::list& sharded) {
             return std::make_unique<SlotWatch>(dictionaries.ptr(), sharded.ptr());
           }),
           py::arg("dictionaries"), py::arg("sharded"))
      .def("changed", &SlotWatch::changed)
      .def_property_readonly_static("method",
                                    [](const py::object&) { return SlotWatch::method(); });

  py::class_<Counter>(module, "Counter")
      .def(py::init(
               [](const py::object& tensor) { return std::make_unique<Counter>(tensor.ptr()); }),
           py::arg("tensor"));

  py::class_<Plan>(module, "Plan")
      .def(py::init([](const py::list& averaged, const py::list& source,
                       const std::vector<std::tuple<bool, std::uint8_t, std::uint32_t>>& options,
                       Arithmetic arithmetic) {
             std::vector<PairOptions> pairs;
             pairs.reserve(options.size());
             for (const auto& [only_copy, average, number] : options) {
               pairs.push_back({only_copy, average, number});
             }
             return std::make_unique<Plan>(averaged.ptr(), source.ptr(), std::move(pairs),
                                           arithmetic);
           }),
           py::arg("averaged"), py::arg("source"), py::arg("options"), py::arg("arithmetic"))
      .def("release", in_turn(&Plan::release))
      .def(
          "matches",
          [](Plan& plan, const py::list& averaged, const py::list& source) {
            const Turn turn = plan.take_turn();
            return plan.matches(averaged.ptr(), source.ptr());
          },
          py::arg("averaged"), py::arg("source"))
      .def("ready", in_turn(&Plan::ready))
      .def(
          "run",
          [](Plan& plan, Operation operation, double weight) {
            const Turn turn = plan.take_turn();
            return plan.run(operation, weight, LaunchOptions{});
          },
          py::arg("operation"), py::arg("weight") = 0.0)
      .def("run_with", &run_with, py::arg("operation"), py::arg("weight"),
           py::arg("weights_by_average"), py::arg("weights_by_pair"), py::arg("found_inf"),
           py::arg("seed"), py::arg("step"), py::arg("step_at"), py::arg("partials"))
      .def("update_model", &update_model, py::arg("weight"), py::arg("averaged"), py::arg("model"),
           py::arg("counter").none(true), py::arg("steps"))
      .def("changed", in_turn(&Plan::changed))
      .def_property_readonly("no_average", &Plan::no_average)
      .def_property_readonly("no_swap", &Plan::no_swap)
      .def_property_readonly("elements", in_turn(&Plan::elements))
      .def_property_readonly("chunks", in_turn(&Plan::chunks))
      .def_property_readonly("partials", in_turn(&Plan::partials));
}
