// The fused parts: products by Torch's BLAS, everything element-wise by the loops of kernels.h, one autograd node a
// part.
#include <ATen/Parallel.h>

#include <cmath>
#include <vector>

#include "common/base/status.h"
#include "model/kernels.h"
#include "model/layers.h"

namespace hearth {
namespace {

using torch::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

constexpr int64_t kRowsGrain = 256;
constexpr int64_t kColumnsGrain = 64;

// Unit distance between columns, whatever the distance between rows: what the loops and BLAS take as it is.
Tensor RowMajor(const Tensor& x) { return x.stride(1) == 1 || x.size(1) == 1 ? x : x.contiguous(); }

template <typename Run>
void ForRows(int64_t rows, const Run& run) {
  at::parallel_for(0, rows, kRowsGrain, run);
}

// Calls run with a value of the tensor's scalar type: float or double.
template <typename Run>
void WithScalar(const Tensor& x, const Run& run) {
  HEARTH_CHECK(x.device().is_cpu(), "the fused parts run on the CPU");
  if (x.scalar_type() == torch::kFloat64) {
    run(double{});
  } else {
    HEARTH_CHECK(x.scalar_type() == torch::kFloat32, "the fused parts compute in float or double");
    run(float{});
  }
}

// ---- feature gate

struct FeatureGateFunction : torch::autograd::Function<FeatureGateFunction> {
  // v [B, w], down [B, L·r], mix_logits [B, L], up [L, r, w] → x [B, w]
  static Tensor forward(AutogradContext* context, Tensor v, Tensor down, Tensor mix_logits, Tensor up) {
    v = RowMajor(v);
    down = RowMajor(down);
    mix_logits = RowMajor(mix_logits);
    const int64_t rows = v.size(0);
    const int64_t width = v.size(1);
    const int64_t subspaces = up.size(0);
    const int64_t rank = up.size(1);
    Tensor s = torch::empty({subspaces, rows, width}, v.options());
    for (int64_t l = 0; l < subspaces; ++l) {
      Tensor a = s.select(0, l);
      at::mm_out(a, down.narrow(1, l * rank, rank), up.select(0, l));
    }
    const Tensor m = torch::empty({rows, subspaces}, v.options());
    const Tensor x = torch::empty({rows, width}, v.options());
    WithScalar(v, [&](auto scalar) {
      using T = decltype(scalar);
      const kernels::FeatureGate<T> gate = {rows,
                                            width,
                                            subspaces,
                                            v.data_ptr<T>(),
                                            v.stride(0),
                                            mix_logits.data_ptr<T>(),
                                            mix_logits.stride(0),
                                            s.data_ptr<T>(),
                                            m.data_ptr<T>(),
                                            x.data_ptr<T>()};
      ForRows(rows, [&gate](int64_t begin, int64_t end) { kernels::Forward(gate, begin, end); });
    });
    context->save_for_backward({v, down, up, s, m});
    return x;
  }

  static variable_list backward(AutogradContext* context, variable_list gradients) {
    const variable_list saved = context->get_saved_variables();
    const Tensor &v = saved[0], &down = saved[1], &up = saved[2], &s = saved[3], &m = saved[4];
    const Tensor dx = gradients[0].contiguous();
    const int64_t rows = v.size(0);
    const int64_t width = v.size(1);
    const int64_t subspaces = up.size(0);
    const int64_t rank = up.size(1);
    const Tensor dv = torch::empty({rows, width}, v.options());
    const Tensor da = torch::empty({subspaces, rows, width}, v.options());
    const Tensor dmix = torch::empty({rows, subspaces}, v.options());
    WithScalar(v, [&](auto scalar) {
      using T = decltype(scalar);
      const kernels::FeatureGateGradient<T> gate = {rows,
                                                    width,
                                                    subspaces,
                                                    v.data_ptr<T>(),
                                                    v.stride(0),
                                                    s.data_ptr<T>(),
                                                    m.data_ptr<T>(),
                                                    dx.data_ptr<T>(),
                                                    dv.data_ptr<T>(),
                                                    da.data_ptr<T>(),
                                                    dmix.data_ptr<T>()};
      ForRows(rows, [&gate](int64_t begin, int64_t end) { kernels::Backward(gate, begin, end); });
    });
    const Tensor ddown = torch::empty({rows, subspaces * rank}, v.options());
    const Tensor dup = torch::empty(up.sizes(), v.options());
    for (int64_t l = 0; l < subspaces; ++l) {
      Tensor ddown_l = ddown.narrow(1, l * rank, rank);
      Tensor dup_l = dup.select(0, l);
      at::mm_out(ddown_l, da.select(0, l), up.select(0, l).t());
      at::mm_out(dup_l, down.narrow(1, l * rank, rank).t(), da.select(0, l));
    }
    return {dv, ddown, dmix, dup};
  }
};

// ---- experts

// Where the moments of one call go, and with what it normalises. Lives as long as the forward.
struct NormCall {
  const BatchNorm* norm;
  const NormMode* mode;
};

// The batch's moments to mode.moments, and mean and 1/√(variance + ε) that normalise this call.
template <typename T>
void PrepareNorm(const NormCall& call, const Tensor& y, const Tensor& mean, const Tensor& inv) {
  const int64_t rows = y.size(0);
  const int64_t columns = y.size(1);
  const NormMode& mode = *call.mode;
  T* mean_out = mean.data_ptr<T>();
  T* inv_out = inv.data_ptr<T>();
  if (!mode.by_batch) {
    const T* running_mean = call.norm->running_mean.data_ptr<T>();
    const T* running_var = call.norm->running_var.data_ptr<T>();
    for (int64_t c = 0; c < columns; ++c) {
      mean_out[c] = running_mean[c];
      inv_out[c] = static_cast<T>(1 / std::sqrt(static_cast<double>(running_var[c]) + mode.epsilon));
    }
  }
  if (!mode.by_batch && mode.moments == nullptr) return;
  std::vector<double> batch_mean(columns);
  std::vector<double> batch_m2(columns);
  at::parallel_for(0, columns, kColumnsGrain, [&](int64_t begin, int64_t end) {
    kernels::ColumnMoments(y.data_ptr<T>(), rows, columns, begin, end, batch_mean.data(), batch_m2.data());
  });
  for (int64_t c = 0; c < columns; ++c) {
    if (mode.moments != nullptr) {
      mode.moments->mean[call.norm->first + c] = static_cast<float>(batch_mean[c]);
      mode.moments->m2[call.norm->first + c] = static_cast<float>(batch_m2[c]);
    }
    if (!mode.by_batch) continue;
    mean_out[c] = static_cast<T>(batch_mean[c]);
    inv_out[c] = static_cast<T>(1 / std::sqrt(batch_m2[c] / static_cast<double>(rows) + mode.epsilon));
  }
}

// hidden = relu(x W1ᵀ + b1) [B, n·h]; y_k = hidden_k W2_kᵀ side by side [B, n·D].
void TwoLayers(const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& output_weight, Tensor* hidden,
               Tensor* y) {
  const int64_t count = output_weight.size(0);
  const int64_t out = output_weight.size(1);
  const int64_t width = output_weight.size(2);
  *hidden = torch::addmm(bias, x, weight.t());
  hidden->relu_();
  *y = torch::empty({x.size(0), count * out}, x.options());
  for (int64_t k = 0; k < count; ++k) {
    Tensor part = y->narrow(1, k * out, out);
    at::mm_out(part, hidden->narrow(1, k * width, width), output_weight.select(0, k).t());
  }
}

// From dy: gradients of x, W1, b1 and W2.
struct TwoLayersGradient {
  Tensor dx, dweight, dbias, doutput_weight;
};
TwoLayersGradient TwoLayersBackward(const Tensor& x, const Tensor& weight, const Tensor& output_weight,
                                    const Tensor& hidden, const Tensor& dy, bool needs_dx) {
  const int64_t count = output_weight.size(0);
  const int64_t out = output_weight.size(1);
  const int64_t width = output_weight.size(2);
  TwoLayersGradient gradient;
  Tensor dhidden = torch::empty(hidden.sizes(), hidden.options());
  gradient.doutput_weight = torch::empty(output_weight.sizes(), output_weight.options());
  for (int64_t k = 0; k < count; ++k) {
    const Tensor dy_k = dy.narrow(1, k * out, out);
    Tensor dhidden_k = dhidden.narrow(1, k * width, width);
    Tensor doutput_k = gradient.doutput_weight.select(0, k);
    at::mm_out(dhidden_k, dy_k, output_weight.select(0, k));
    at::mm_out(doutput_k, dy_k.t(), hidden.narrow(1, k * width, width));
  }
  at::threshold_backward_out(dhidden, dhidden, hidden, 0);
  gradient.dweight = torch::mm(dhidden.t(), x);
  gradient.dbias = dhidden.sum(0);
  if (needs_dx) gradient.dx = torch::mm(dhidden, weight);
  return gradient;
}

struct HomeExpertsFunction : torch::autograd::Function<HomeExpertsFunction> {
  // x [B, in] → Swish(BN(MLP(x))) [B, n·D]
  static Tensor forward(AutogradContext* context, Tensor x, Tensor weight, Tensor bias, Tensor output_weight,
                        Tensor norm_weight, Tensor norm_bias, NormCall call) {
    context->saved_data["needs_dx"] = x.requires_grad();
    x = RowMajor(x);
    Tensor hidden, y;
    TwoLayers(x, weight, bias, output_weight, &hidden, &y);
    const Tensor mean = torch::empty({y.size(1)}, y.options());
    const Tensor inv = torch::empty({y.size(1)}, y.options());
    const Tensor out = torch::empty(y.sizes(), y.options());
    WithScalar(x, [&](auto scalar) {
      using T = decltype(scalar);
      PrepareNorm<T>(call, y, mean, inv);
      const kernels::NormSwish<T> norm = {y.size(0),
                                          y.size(1),
                                          y.data_ptr<T>(),
                                          mean.data_ptr<T>(),
                                          inv.data_ptr<T>(),
                                          norm_weight.data_ptr<T>(),
                                          norm_bias.data_ptr<T>(),
                                          out.data_ptr<T>()};
      ForRows(y.size(0), [&norm](int64_t begin, int64_t end) { kernels::Forward(norm, begin, end); });
    });
    context->saved_data["by_batch"] = call.mode->by_batch;
    context->save_for_backward({x, weight, output_weight, norm_weight, norm_bias, hidden, y, mean, inv});
    return out;
  }

  static variable_list backward(AutogradContext* context, variable_list gradients) {
    const variable_list saved = context->get_saved_variables();
    const Tensor &x = saved[0], &weight = saved[1], &output_weight = saved[2], &norm_weight = saved[3],
                 &norm_bias = saved[4], &hidden = saved[5], &y = saved[6], &mean = saved[7], &inv = saved[8];
    const Tensor dout = gradients[0].contiguous();
    const Tensor dy = torch::empty(y.sizes(), y.options());
    const Tensor dnorm_weight = torch::empty(norm_weight.sizes(), y.options());
    const Tensor dnorm_bias = torch::empty(norm_bias.sizes(), y.options());
    WithScalar(y, [&](auto scalar) {
      using T = decltype(scalar);
      const kernels::NormSwishGradient<T> norm = {y.size(0),
                                                  y.size(1),
                                                  context->saved_data["by_batch"].toBool(),
                                                  y.data_ptr<T>(),
                                                  mean.data_ptr<T>(),
                                                  inv.data_ptr<T>(),
                                                  norm_weight.data_ptr<T>(),
                                                  norm_bias.data_ptr<T>(),
                                                  dout.data_ptr<T>(),
                                                  dy.data_ptr<T>(),
                                                  dnorm_weight.data_ptr<T>(),
                                                  dnorm_bias.data_ptr<T>()};
      at::parallel_for(0, y.size(1), kColumnsGrain,
                       [&norm](int64_t begin, int64_t end) { kernels::Backward(norm, begin, end); });
    });
    const TwoLayersGradient layers =
        TwoLayersBackward(x, weight, output_weight, hidden, dy, context->saved_data["needs_dx"].toBool());
    return {layers.dx, layers.dweight, layers.dbias, layers.doutput_weight, dnorm_weight, dnorm_bias, Tensor()};
  }
};

struct PlainExpertsFunction : torch::autograd::Function<PlainExpertsFunction> {
  // x [B, in] → relu(MLP(x)) [B, n·D]
  static Tensor forward(AutogradContext* context, Tensor x, Tensor weight, Tensor bias, Tensor output_weight,
                        Tensor output_bias) {
    context->saved_data["needs_dx"] = x.requires_grad();
    x = RowMajor(x);
    Tensor hidden, out;
    TwoLayers(x, weight, bias, output_weight, &hidden, &out);
    out.add_(output_bias).relu_();
    context->save_for_backward({x, weight, output_weight, hidden, out});
    return out;
  }

  static variable_list backward(AutogradContext* context, variable_list gradients) {
    const variable_list saved = context->get_saved_variables();
    const Tensor &x = saved[0], &weight = saved[1], &output_weight = saved[2], &hidden = saved[3], &out = saved[4];
    const Tensor dy = at::threshold_backward(gradients[0].contiguous(), out, 0);
    const TwoLayersGradient layers =
        TwoLayersBackward(x, weight, output_weight, hidden, dy, context->saved_data["needs_dx"].toBool());
    return {layers.dx, layers.dweight, layers.dbias, layers.doutput_weight, dy.sum(0)};
  }
};

// ---- mixture

// The experts of several blocks [B, n_i·D], side by side: expert e's columns and the distance between its rows.
template <typename T>
struct ExpertPointers {
  ExpertPointers(const variable_list& blocks, int64_t width) {
    for (const Tensor& block : blocks) {
      for (int64_t column = 0; column < block.size(1); column += width) {
        data.push_back(block.data_ptr<T>() + column);
        distance.push_back(block.stride(0));
      }
    }
  }
  std::vector<T*> data;
  std::vector<int64_t> distance;
};

struct MixtureFunction : torch::autograd::Function<MixtureFunction> {
  // inputs: gate logits [B, n], self logits [B, n_own] or [B, 0], then the blocks → z [B, D]
  static Tensor forward(AutogradContext* context, Tensor gate_logits, Tensor self_logits,
                        at::ArrayRef<Tensor> block_list, int64_t own, int64_t width) {
    gate_logits = RowMajor(gate_logits);
    self_logits = RowMajor(self_logits);
    variable_list blocks;
    for (const Tensor& block : block_list) blocks.push_back(block.contiguous());
    const int64_t rows = gate_logits.size(0);
    const Tensor g = torch::empty({rows, gate_logits.size(1)}, gate_logits.options());
    const Tensor u = torch::empty({rows, self_logits.size(1)}, gate_logits.options());
    const Tensor z = torch::empty({rows, width}, gate_logits.options());
    WithScalar(z, [&](auto scalar) {
      using T = decltype(scalar);
      const ExpertPointers<T> experts(blocks, width);
      HEARTH_CHECK(static_cast<int64_t>(experts.data.size()) == gate_logits.size(1), "a gate over other experts");
      const kernels::Mixture<T> mixture = {width,
                                           gate_logits.size(1),
                                           own,
                                           self_logits.size(1),
                                           experts.data.data(),
                                           experts.distance.data(),
                                           gate_logits.data_ptr<T>(),
                                           gate_logits.stride(0),
                                           self_logits.data_ptr<T>(),
                                           self_logits.stride(0),
                                           g.data_ptr<T>(),
                                           u.data_ptr<T>(),
                                           z.data_ptr<T>()};
      ForRows(rows, [&mixture](int64_t begin, int64_t end) { kernels::Forward(mixture, begin, end); });
    });
    context->saved_data["own"] = own;
    variable_list saved = {g, u};
    saved.insert(saved.end(), blocks.begin(), blocks.end());
    context->save_for_backward(std::move(saved));
    return z;
  }

  static variable_list backward(AutogradContext* context, variable_list gradients) {
    const variable_list saved = context->get_saved_variables();
    const Tensor &g = saved[0], &u = saved[1];
    const variable_list blocks(saved.begin() + 2, saved.end());
    const Tensor dz = gradients[0].contiguous();
    const Tensor dgate = torch::empty(g.sizes(), g.options());
    const Tensor dself = torch::empty(u.sizes(), u.options());
    variable_list dblocks;
    for (const Tensor& block : blocks) dblocks.push_back(torch::empty(block.sizes(), block.options()));
    WithScalar(dz, [&](auto scalar) {
      using T = decltype(scalar);
      const ExpertPointers<T> experts(blocks, dz.size(1));
      const ExpertPointers<T> dexperts(dblocks, dz.size(1));
      const kernels::MixtureGradient<T> mixture = {dz.size(1),
                                                   g.size(1),
                                                   context->saved_data["own"].toInt(),
                                                   u.size(1),
                                                   experts.data.data(),
                                                   experts.distance.data(),
                                                   g.data_ptr<T>(),
                                                   u.data_ptr<T>(),
                                                   dz.data_ptr<T>(),
                                                   dexperts.data.data(),
                                                   dgate.data_ptr<T>(),
                                                   dself.data_ptr<T>()};
      ForRows(dz.size(0), [&mixture](int64_t begin, int64_t end) { kernels::Backward(mixture, begin, end); });
    });
    variable_list result = {dgate, dself};
    result.insert(result.end(), dblocks.begin(), dblocks.end());
    result.push_back(Tensor());  // own
    result.push_back(Tensor());  // width
    return result;
  }
};

}  // namespace

Tensor FusedParts::Linear(const Tensor& x, const Tensor& weight, const Tensor& bias) {
  return torch::linear(x, weight, bias);
}

Tensor FusedParts::FeatureGate(const FeatureGateParameters& gate, const Tensor& v, const Tensor& down,
                               const Tensor& mix_logits) {
  return FeatureGateFunction::apply(v, down, mix_logits, gate.up);
}

Tensor FusedParts::Experts(const ExpertStack& stack, const Tensor& x) {
  if (!stack.home) {
    return PlainExpertsFunction::apply(x, stack.first.weight, stack.first.bias, stack.output_weight, stack.output_bias);
  }
  return HomeExpertsFunction::apply(x, stack.first.weight, stack.first.bias, stack.output_weight, stack.norm.weight,
                                    stack.norm.bias, NormCall{&stack.norm, &mode_});
}

Tensor FusedParts::Mixture(const Tensor& gate_logits, const Tensor& self_logits, const std::vector<Tensor>& blocks,
                           int own_block, int64_t width) {
  int64_t own = 0;
  for (int i = 0; i < own_block; ++i) own += blocks[i].size(1) / width;
  const Tensor self = self_logits.defined() ? self_logits : gate_logits.detach().narrow(1, 0, 0);
  return MixtureFunction::apply(gate_logits, self, at::ArrayRef<Tensor>(blocks), own, width);
}

Tensor FusedParts::Towers(const std::vector<Tower>& towers, const std::vector<Tensor>& inputs) {
  return TowersReference(towers, inputs);
}

}  // namespace hearth
