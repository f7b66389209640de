// An operator as torch's dispatcher calls it: arguments from its stack, results back onto it.
//
// An operator is a function that checks its arguments and returns what is to be done, as Work; then
// a backend does it. TORCH_BOX knows no parameter that stands for several arguments, such as the
// rule's.
#pragma once

#include <cstddef>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>

#include "checks.h"
#include "tensor.h"

namespace gmc {

// What is to be done, where, and what the operator then returns.
template <class Call, class... Results>
struct Work {
  Call call;
  Device device;
  std::tuple<Results...> results;
};

// An operator's arguments on the dispatcher's stack. Each must be taken, in order, and belongs to
// the code that takes it.
class Arguments {
 public:
  explicit Arguments(StableIValue* stack) : next_(stack) {}

  template <class T>
  T take() {
    if constexpr (std::is_constructible_v<T, Arguments&>) {
      return T(*this);
    } else {
      return torch::stable::detail::to<T>(*next_++);
    }
  }

  uint64_t taken(const StableIValue* stack) const { return next_ - stack; }

 private:
  StableIValue* next_;
};

// "merge" of "merge(Tensor payloads, ...) -> Tensor".
inline std::string op_name(const char* schema) {
  const std::string text = schema;
  return text.substr(0, text.find('('));
}

template <class Backend, const char* schema, auto check>
struct Boxed;

template <class Backend, const char* schema, class Call, class... Results, class... Parameters,
          Work<Call, Results...> (*check)(Parameters...)>
struct Boxed<Backend, schema, check> {
  static void run(StableIValue* stack, uint64_t arguments, uint64_t results) {
    Arguments in(stack);
    // Braces take them from left to right.
    const std::tuple<std::decay_t<Parameters>...> given{in.take<std::decay_t<Parameters>>()...};
    if (in.taken(stack) != arguments || sizeof...(Results) != results)
      raise("RuntimeError", "arguments or results differ from the schema ", schema);
    const auto work = std::apply(check, given);
    Backend::run(schema, work.call, work.device);
    put(stack, work.results, std::index_sequence_for<Results...>());
  }

 private:
  template <size_t... i>
  static void put(StableIValue* stack, const std::tuple<Results...>& results,
                  std::index_sequence<i...>) {
    ((stack[i] = torch::stable::detail::from(std::get<i>(results))), ...);
  }
};

}  // namespace gmc
