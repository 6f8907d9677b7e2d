// Normalised queries and keys in SD3's joint layout, on the CPU. Schema, equations and reference:
// dgpo_fast/ops/joint_qk_norm.py.

#include "joint_qk_norm.h"

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "arguments.h"
#include "dispatch.h"
#include "parallel.h"

namespace dgpo_fast::cpu {
namespace {

using OptionalTensor = std::optional<Tensor>;

// Tokens that are added up in one go for the weights: the order of the sums depends on their number alone, not on that
// of the threads.
constexpr int64_t kChunk = 8;

void check_kind(const Tensor& tensor, const char* name, const Tensor& q_image) {
  check_argument(tensor.scalar_type() == q_image.scalar_type(), name, "expected the dtype of q_image, ",
                 dtype_name(q_image), ", got ", dtype_name(tensor));
  check_argument(tensor.is_cpu(), name, "expected the device of q_image, cpu");
}

void check_projection(const Tensor& tensor, const char* name, const Tensor& queries, const Tensor& q_image) {
  check_argument(tensor.dim() == 3 && tensor.size(0) == queries.size(0) && has_samples_like(tensor, queries), name,
                 "expected the shape of the queries, [", queries.size(0), ", ", queries.size(1), ", ", queries.size(2),
                 "]");
  check_kind(tensor, name, q_image);
}

void check_weight(const Tensor& weight, const char* name, const Tensor& q_image, int64_t size) {
  check_argument(weight.dim() == 1 && weight.size(0) == size, name, "expected [", size,
                 "], a number for each element of a head");
  check_kind(weight, name, q_image);
}

void check_beside(const OptionalTensor& tensor, const char* name, const OptionalTensor& q_text) {
  check_argument(tensor.has_value() == q_text.has_value(), name,
                 q_text ? "expected a tensor beside q_text, got None" : "expected None without q_text, got a tensor");
}

void check_arguments(const Tensor& q_image, const Tensor& k_image, const Tensor& v_image, const OptionalTensor& q_text,
                     const OptionalTensor& k_text, const OptionalTensor& v_text, const Tensor& w_q_image,
                     const Tensor& w_k_image, const OptionalTensor& w_q_text, const OptionalTensor& w_k_text,
                     int64_t num_heads, double eps) {
  check_argument(q_image.dim() == 3, "q_image", "expected [B, N, H D], got ", q_image.dim(), " dimensions");
  check_floating(q_image, "q_image");
  const int64_t width = q_image.size(2);
  check_argument(num_heads >= 1 && width % num_heads == 0, "num_heads", "expected a divisor of the width of q_image, ",
                 width, ", got ", num_heads);
  check_argument(eps > 0, "eps", "expected a positive number, got ", eps);
  check_beside(k_text, "k_text", q_text);
  check_beside(v_text, "v_text", q_text);
  check_beside(w_q_text, "w_q_text", q_text);
  check_beside(w_k_text, "w_k_text", q_text);
  check_projection(k_image, "k_image", q_image, q_image);
  check_projection(v_image, "v_image", q_image, q_image);
  check_weight(w_q_image, "w_q_image", q_image, width / num_heads);
  check_weight(w_k_image, "w_k_image", q_image, width / num_heads);
  if (!q_text) return;
  check_argument(q_text->dim() == 3 && q_text->size(0) == q_image.size(0) && q_text->size(2) == width, "q_text",
                 "expected tokens as those of q_image, [", q_image.size(0), ", N, ", width, "]");
  check_kind(*q_text, "q_text", q_image);
  check_projection(*k_text, "k_text", *q_text, q_image);
  check_projection(*v_text, "v_text", *q_text, q_image);
  check_weight(*w_q_text, "w_q_text", q_image, width / num_heads);
  check_weight(*w_k_text, "w_k_text", q_image, width / num_heads);
}

// What the parts of one call share.
struct Layout {
  Layout(const Tensor& q_image, const OptionalTensor& q_text, int64_t heads, double eps)
      : num_samples(q_image.size(0)),
        num_image(q_image.size(1)),
        num_tokens(num_image + (q_text ? q_text->size(1) : 0)),
        num_heads(heads),
        size(q_image.size(2) / heads),
        width(q_image.size(2)),
        eps(eps) {}

  const int64_t num_samples, num_image, num_tokens, num_heads, size, width;
  const double eps;
};

// The tokens of one projection where they lie, and their places in the joint layout, from token `first` of a sample on.
template <typename value_t>
class Tokens {
 public:
  Tokens(const Tensor& projection, int64_t first, const Layout& layout)
      : dense_(with_contiguous_from(projection, 2)),
        values_(dense_.const_data_ptr<value_t>()),
        sample_stride_(dense_.stride(0)),
        token_stride_(dense_.stride(1)),
        num_tokens_(dense_.size(1)),
        first_(first),
        layout_(layout) {}

  int64_t count() const { return layout_.num_samples * num_tokens_; }
  const value_t* values(int64_t t) const {
    return values_ + t / num_tokens_ * sample_stride_ + t % num_tokens_ * token_stride_;
  }
  int64_t in_joint(int64_t t) const {
    return (t / num_tokens_ * layout_.num_tokens + first_ + t % num_tokens_) * layout_.width;
  }

  // Calls body(begin, end) for ranges of tokens that together cover all, on all threads; none cuts `unit` tokens.
  template <typename Body>
  void for_ranges(int64_t unit, const Body& body) const {
    const int64_t grain = std::max<int64_t>(1, kGrainSize / std::max<int64_t>(1, unit * layout_.width));
    torch::stable::parallel_for(0, (count() + unit - 1) / unit, grain, [&](int64_t begin, int64_t end) {
      body(begin * unit, std::min(end * unit, count()));
    });
  }

 private:
  const Tensor dense_;
  const value_t* values_;
  const int64_t sample_stride_, token_stride_, num_tokens_, first_;
  const Layout& layout_;
};

template <typename value_t>
void write_normalised(const Tokens<value_t>& tokens, const Tensor& weight_D, const Layout& layout,
                      const Tensor& joint) {
  const Tensor dense_weight = torch::stable::contiguous(weight_D);
  const value_t* weight = dense_weight.const_data_ptr<value_t>();
  value_t* out = joint.mutable_data_ptr<value_t>();
  const auto eps = static_cast<arithmetic_t<value_t>>(layout.eps);
  tokens.for_ranges(1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t)
      normalise_heads(tokens.values(t), weight, eps, layout.num_heads, layout.size, out + tokens.in_joint(t));
  });
}

template <typename value_t>
void write_copy(const Tokens<value_t>& tokens, const Layout& layout, const Tensor& joint) {
  value_t* out = joint.mutable_data_ptr<value_t>();
  tokens.for_ranges(1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) std::copy_n(tokens.values(t), layout.width, out + tokens.in_joint(t));
  });
}

std::tuple<Tensor, Tensor, Tensor> joint_qk_norm(const Tensor& q_image, const Tensor& k_image, const Tensor& v_image,
                                                 const OptionalTensor& q_text, const OptionalTensor& k_text,
                                                 const OptionalTensor& v_text, const Tensor& w_q_image,
                                                 const Tensor& w_k_image, const OptionalTensor& w_q_text,
                                                 const OptionalTensor& w_k_text, int64_t num_heads, double eps) {
  check_arguments(q_image, k_image, v_image, q_text, k_text, v_text, w_q_image, w_k_image, w_q_text, w_k_text,
                  num_heads, eps);
  const Layout layout(q_image, q_text, num_heads, eps);
  const auto joint = [&] { return empty(q_image, {layout.num_samples, layout.num_tokens, num_heads, layout.size}); };
  const Tensor q = joint(), k = joint(), v = joint();
  dispatch_floating(q_image.scalar_type(), [&]<typename value_t>() {
    using T = Tokens<value_t>;
    write_normalised(T(q_image, 0, layout), w_q_image, layout, q);
    write_normalised(T(k_image, 0, layout), w_k_image, layout, k);
    write_copy(T(v_image, 0, layout), layout, v);
    if (!q_text) return;
    write_normalised(T(*q_text, layout.num_image, layout), *w_q_text, layout, q);
    write_normalised(T(*k_text, layout.num_image, layout), *w_k_text, layout, k);
    write_copy(T(*v_text, layout.num_image, layout), layout, v);
  });
  return {q, k, v};
}

// Where the gradients of q, k and v stand in those of their stream, [B, N, 3 H D].
enum Projection { kQueries, kKeys, kValues, kNumProjections };

template <typename value_t>
value_t* gradient_of(Projection projection, const Tensor& grad_stream, const Layout& layout) {
  return grad_stream.mutable_data_ptr<value_t>() + projection * layout.width;
}

// Writes the gradient of queries or keys into that of their stream, and, where it has elements, that of their weight to
// `grad_weight`.
template <typename value_t>
void write_gradients(const Tensor& grad_joint, const Tokens<value_t>& tokens, const Tensor& weight_D,
                     const Layout& layout, Projection projection, const Tensor& grad_stream, const Tensor& grad_weight) {
  using math_t = arithmetic_t<value_t>;
  const Tensor dense_weight = torch::stable::contiguous(weight_D);
  const value_t *grad = grad_joint.const_data_ptr<value_t>(), *weight = dense_weight.const_data_ptr<value_t>();
  value_t* out = gradient_of<value_t>(projection, grad_stream, layout);
  const int64_t num_sums = grad_weight.numel(), num_chunks = (tokens.count() + kChunk - 1) / kChunk;
  std::vector<math_t> partial(num_chunks * num_sums);
  tokens.for_ranges(kChunk, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t)
      normalise_heads_backward(grad + tokens.in_joint(t), tokens.values(t), weight, static_cast<math_t>(layout.eps),
                               layout.num_heads, layout.size, out + t * kNumProjections * layout.width,
                               num_sums > 0 ? &partial[t / kChunk * num_sums] : nullptr);
  });
  value_t* out_weight = grad_weight.mutable_data_ptr<value_t>();
  for (int64_t d = 0; d < num_sums; ++d) {
    double sum = 0;
    for (int64_t chunk = 0; chunk < num_chunks; ++chunk) sum += partial[chunk * num_sums + d];
    out_weight[d] = static_cast<value_t>(static_cast<math_t>(sum));
  }
}

template <typename value_t>
void write_values(const Tensor& grad_joint, const Tokens<value_t>& tokens, const Layout& layout,
                  const Tensor& grad_stream) {
  const value_t* grad = grad_joint.const_data_ptr<value_t>();
  value_t* out = gradient_of<value_t>(kValues, grad_stream, layout);
  tokens.for_ranges(1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t)
      std::copy_n(grad + tokens.in_joint(t), layout.width, out + t * kNumProjections * layout.width);
  });
}

void check_gradient(const Tensor& grad, const char* name, const Tensor& q_image, const Layout& layout) {
  check_argument(grad.dim() == 4 && grad.size(0) == layout.num_samples && grad.size(1) == layout.num_tokens &&
                     grad.size(2) == layout.num_heads && grad.size(3) == layout.size,
                 name, "expected the joint layout, [", layout.num_samples, ", ", layout.num_tokens, ", ",
                 layout.num_heads, ", ", layout.size, "]");
  check_kind(grad, name, q_image);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> joint_qk_norm_backward(
    const Tensor& grad_q, const Tensor& grad_k, const Tensor& grad_v, const Tensor& q_image, const Tensor& k_image,
    const OptionalTensor& q_text, const OptionalTensor& k_text, const Tensor& w_q_image, const Tensor& w_k_image,
    const OptionalTensor& w_q_text, const OptionalTensor& w_k_text, int64_t num_heads, double eps, bool with_weights) {
  // The values are not needed for their gradient, and have the shape of the queries.
  check_arguments(q_image, k_image, q_image, q_text, k_text, q_text, w_q_image, w_k_image, w_q_text, w_k_text,
                  num_heads, eps);
  const Layout layout(q_image, q_text, num_heads, eps);
  check_gradient(grad_q, "grad_q", q_image, layout);
  check_gradient(grad_k, "grad_k", q_image, layout);
  check_gradient(grad_v, "grad_v", q_image, layout);
  const Tensor of_q = torch::stable::contiguous(grad_q), of_k = torch::stable::contiguous(grad_k);
  const Tensor of_v = torch::stable::contiguous(grad_v);

  const int64_t columns = kNumProjections * layout.width;
  const Tensor image = empty(q_image, {layout.num_samples, layout.num_image, columns});
  const Tensor text =
      q_text ? empty(q_image, {layout.num_samples, q_text->size(1), columns}) : empty(q_image, {0});
  const auto of_weight = [&](bool given) { return empty(q_image, {given && with_weights ? layout.size : 0}); };
  const Tensor w_q_i = of_weight(true), w_k_i = of_weight(true);
  const Tensor w_q_t = of_weight(q_text.has_value()), w_k_t = of_weight(q_text.has_value());
  dispatch_floating(q_image.scalar_type(), [&]<typename value_t>() {
    const Tokens<value_t> q(q_image, 0, layout), k(k_image, 0, layout);
    write_gradients(of_q, q, w_q_image, layout, kQueries, image, w_q_i);
    write_gradients(of_k, k, w_k_image, layout, kKeys, image, w_k_i);
    write_values(of_v, q, layout, image);
    if (!q_text) return;
    const Tokens<value_t> q_of_text(*q_text, layout.num_image, layout), k_of_text(*k_text, layout.num_image, layout);
    write_gradients(of_q, q_of_text, *w_q_text, layout, kQueries, text, w_q_t);
    write_gradients(of_k, k_of_text, *w_k_text, layout, kKeys, text, w_k_t);
    write_values(of_v, q_of_text, layout, text);
  });
  return {image, text, w_q_i, w_k_i, w_q_t, w_k_t};
}

}  // namespace
}  // namespace dgpo_fast::cpu

STABLE_TORCH_LIBRARY_IMPL(dgpo_fast, CPU, m) {
  m.impl("joint_qk_norm", TORCH_BOX(&dgpo_fast::cpu::joint_qk_norm));
  m.impl("joint_qk_norm_backward", TORCH_BOX(&dgpo_fast::cpu::joint_qk_norm_backward));
}
