// What every binding needs between torch's stable tensors and the kernels' raw pointers: dtype dispatch, checks, pointers, scratch memory.
#pragma once
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/shim_utils.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <string>
#include <type_traits>
#include <vector>

#include "storage.h"

namespace s2s {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline std::string dtype_name(ScalarType type) {
  switch (type) {
    case ScalarType::Double:
      return "float64";
    case ScalarType::Float:
      return "float32";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Half:
      return "float16";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Bool:
      return "bool";
    default:
      return torch::headeronly::toString(type);
  }
}

template <class T>
struct ScalarTypeOf;
template <>
struct ScalarTypeOf<double> : std::integral_constant<ScalarType, ScalarType::Double> {};
template <>
struct ScalarTypeOf<float> : std::integral_constant<ScalarType, ScalarType::Float> {};
template <>
struct ScalarTypeOf<bfloat16> : std::integral_constant<ScalarType, ScalarType::BFloat16> {};
template <>
struct ScalarTypeOf<float16> : std::integral_constant<ScalarType, ScalarType::Half> {};
template <>
struct ScalarTypeOf<int64_t> : std::integral_constant<ScalarType, ScalarType::Long> {};
template <>
struct ScalarTypeOf<int32_t> : std::integral_constant<ScalarType, ScalarType::Int> {};
template <>
struct ScalarTypeOf<bool> : std::integral_constant<ScalarType, ScalarType::Bool> {};
template <>
struct ScalarTypeOf<uint8_t> : std::integral_constant<ScalarType, ScalarType::Byte> {};

template <class T>
inline constexpr ScalarType scalar_type_of = ScalarTypeOf<std::remove_const_t<T>>::value;

inline std::string shape_text(const Tensor& tensor) {
  std::ostringstream text;
  text << '(';
  for (int64_t i = 0; i < tensor.dim(); ++i) text << (i ? ", " : "") << tensor.size(i);
  text << ')';
  return text.str();
}

// Checks. All of them name the operator and the argument, and say what was expected and what was given.
inline void check_cpu(const char* op, const char* name, const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.is_cpu(), op, ": ", name, " must be on the CPU");
}

inline void check_dim(const char* op, const char* name, const Tensor& tensor, int64_t dim) {
  STD_TORCH_CHECK(tensor.dim() == dim, op, ": ", name, " must have ", dim, " dimensions, got ", tensor.dim());
}

inline void check_dtype(const char* op, const char* name, const Tensor& tensor, ScalarType type) {
  STD_TORCH_CHECK(tensor.scalar_type() == type, op, ": ", name, " must be ", dtype_name(type), ", got ", dtype_name(tensor.scalar_type()));
}

// A size of -1 stands for any.
inline void check_shape(const char* op, const char* name, const Tensor& tensor, std::initializer_list<int64_t> sizes) {
  bool equal = tensor.dim() == static_cast<int64_t>(sizes.size());
  int64_t i = 0;
  for (const int64_t size : sizes) {
    if (equal && size >= 0 && tensor.size(i) != size) equal = false;
    ++i;
  }
  if (equal) return;  // a stream costs half a microsecond, and a small call makes many of these checks
  std::ostringstream expected;
  expected << '(';
  const char* separator = "";
  for (const int64_t size : sizes) {
    expected << separator;
    separator = ", ";
    if (size < 0)
      expected << '*';
    else
      expected << size;
  }
  expected << ')';
  STD_TORCH_CHECK(false, op, ": ", name, " must have shape ", expected.str(), ", got ", shape_text(tensor));
}

// On the CPU, of this dtype and shape; an absent optional passes.
inline void check_argument(const char* op, const char* name, const Tensor& tensor, ScalarType type, std::initializer_list<int64_t> sizes) {
  check_cpu(op, name, tensor);
  check_dtype(op, name, tensor, type);
  check_shape(op, name, tensor, sizes);
}
inline void check_argument(const char* op, const char* name, const OptionalTensor& tensor, ScalarType type,
                           std::initializer_list<int64_t> sizes) {
  if (tensor) check_argument(op, name, *tensor, type, sizes);
}

// f(T{}) with the storage type of a floating tensor: double, float, bfloat16 or float16.
template <class F>
auto dispatch_floating(const char* op, const char* name, ScalarType type, F&& f) {
  switch (type) {
    case ScalarType::Double:
      return f(double{});
    case ScalarType::BFloat16:
      return f(bfloat16{});
    case ScalarType::Half:
      return f(float16{});
    default:
      STD_TORCH_CHECK(type == ScalarType::Float, op, ": ", name, " must be float64, float32, bfloat16 or float16, got ", dtype_name(type));
      return f(float{});
  }
}
template <class F>
auto dispatch_floating(const char* op, const char* name, const Tensor& tensor, F&& f) {
  return dispatch_floating(op, name, tensor.scalar_type(), static_cast<F&&>(f));
}

// Data pointers as storage types. The dtype must have been checked or dispatched on.
template <class T>
const T* data(const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.scalar_type() == scalar_type_of<T>, "expected ", dtype_name(scalar_type_of<T>), ", got ",
                  dtype_name(tensor.scalar_type()));
  return static_cast<const T*>(tensor.const_data_ptr());
}
template <class T>
const T* data(const OptionalTensor& tensor) {
  return tensor ? data<T>(*tensor) : nullptr;
}
template <class T>
T* mutable_data(const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.scalar_type() == scalar_type_of<T>, "expected ", dtype_name(scalar_type_of<T>), ", got ",
                  dtype_name(tensor.scalar_type()));
  return static_cast<T*>(tensor.mutable_data_ptr());
}
template <class T>
T* mutable_data(const OptionalTensor& tensor) {
  return tensor ? mutable_data<T>(*tensor) : nullptr;
}

inline Tensor as_contiguous(const Tensor& tensor) { return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor); }
inline OptionalTensor as_contiguous(const OptionalTensor& tensor) { return tensor ? OptionalTensor(as_contiguous(*tensor)) : std::nullopt; }

// Whether fresh memory holds NaN (every byte is 255), so that what no kernel wrote shows: S2S_FILL=1, as in the tests. torch's own
// switch for that belongs to aten::empty, which costs a small call four times what the allocation does.
inline const bool fresh_is_filled = [] {
  const char* const asked = std::getenv("S2S_FILL");
  return asked && std::strcmp(asked, "1") == 0;
}();

// A new contiguous CPU tensor, uninitialised.
inline Tensor empty_cpu(std::initializer_list<int64_t> sizes, ScalarType type) {
  constexpr size_t most = 8;
  STD_TORCH_CHECK(sizes.size() <= most, "a new tensor has at most ", most, " dimensions, got ", sizes.size());
  std::array<int64_t, most> strides;
  int64_t stride = 1;
  for (size_t i = sizes.size(); i-- > 0;) {
    strides[i] = stride;
    stride *= std::max<int64_t>(sizes.begin()[i], 1);
  }
  AtenTensorHandle handle;
  // torch 2.11 has no other macro for this.
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.begin(), strides.data(),
                                                  torch::stable::detail::to<int32_t>(torch::stable::detail::from(type)),
                                                  aoti_torch_device_type_cpu(), 0, &handle));
  const Tensor result(handle);
  if (fresh_is_filled && result.numel())
    std::memset(result.mutable_data_ptr(), 255, static_cast<size_t>(result.numel()) * result.element_size());
  return result;
}

// A tensor's data with its sizes and strides in elements; data of a const T may not be written.
template <class T, int Rank>
struct View {
  T* data = nullptr;
  int64_t size[Rank] = {};
  int64_t stride[Rank] = {};
  explicit operator bool() const { return data != nullptr; }
};

template <class T, int Rank>
View<T, Rank> view(const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.dim() == Rank, "expected ", Rank, " dimensions, got ", tensor.dim());
  View<T, Rank> result;
  if constexpr (std::is_const_v<T>)
    result.data = data<std::remove_const_t<T>>(tensor);
  else
    result.data = mutable_data<T>(tensor);
  for (int i = 0; i < Rank; ++i) {
    result.size[i] = tensor.size(i);
    result.stride[i] = tensor.stride(i);
  }
  return result;
}
template <class T, int Rank>
View<T, Rank> view(const OptionalTensor& tensor) {
  return tensor ? view<T, Rank>(*tensor) : View<T, Rank>{};
}

// Scratch memory from torch's allocator, uninitialised, aligned to 64 bytes; every part taken from it is too.
class __attribute__((visibility("hidden"))) Workspace {
 public:
  explicit Workspace(int64_t bytes) : tensor_(empty_cpu({bytes + 64}, ScalarType::Byte)) {
    const auto address = reinterpret_cast<uintptr_t>(mutable_data<uint8_t>(tensor_));
    begin_ = reinterpret_cast<uint8_t*>((address + 63) / 64 * 64);
    end_ = begin_ + bytes;
  }
  // The bytes that `count` elements of T take here.
  template <class T>
  static int64_t bytes(int64_t count) {
    return (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
  }
  template <class T>
  T* take(int64_t count) {
    T* part = reinterpret_cast<T*>(begin_);
    begin_ += bytes<T>(count);
    STD_TORCH_CHECK(begin_ <= end_, "workspace exhausted");
    return part;
  }

 private:
  Tensor tensor_;
  uint8_t* begin_;
  uint8_t* end_;
};

// The two words of a random seed, an int64 tensor of two.
inline std::array<int64_t, 2> seed_words(const char* op, const char* name, const Tensor& seed) {
  check_argument(op, name, seed, ScalarType::Long, {2});
  const int64_t* words = data<int64_t>(seed);
  return {words[0], words[seed.stride(0)]};
}

}  // namespace s2s
