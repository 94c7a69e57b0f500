// The element-wise loops of the fused model: plain arrays, no Torch, one pass where a chain of tensor operations would
// take five. Vectorised by the compiler for several instruction sets and chosen at run time; no contraction and a fixed
// order of every sum, so the instruction set does not change the bits. All sizes are in elements; `ld…` is the distance
// between rows.
//
// Row ranges [begin, end) and column ranges let the caller split the work between threads: rows are independent of each
// other, and so are columns, so the split does not change the bits either.
#pragma once

#include <cstdint>

namespace hearth::kernels {

// A feature gate on `width` columns with L sub-spaces (docs/MODEL.md §2):
//   m = softmax(mix_logits);  s_l = σ(a_l);  x = v ⊙ 2 Σ_l m_l s_l
// In: s holds the pre-activations a [L, rows, width]. Out: s the sigmoids, m [rows, L], x [rows, width].
template <typename T>
struct FeatureGate {
  int64_t rows, width, subspaces;
  const T* v;
  int64_t ld_v;
  const T* mix_logits;
  int64_t ld_mix;
  T* s;
  T* m;
  T* x;
};
void Forward(const FeatureGate<float>& gate, int64_t begin, int64_t end);
void Forward(const FeatureGate<double>& gate, int64_t begin, int64_t end);

template <typename T>
struct FeatureGateGradient {
  int64_t rows, width, subspaces;
  const T* v;
  int64_t ld_v;
  const T* s;
  const T* m;
  const T* dx;  // [rows, width]
  T* dv;        // [rows, width]
  T* da;        // [L, rows, width]
  T* dmix;      // [rows, L] of the logits
};
void Backward(const FeatureGateGradient<float>& gate, int64_t begin, int64_t end);
void Backward(const FeatureGateGradient<double>& gate, int64_t begin, int64_t end);

// Mean and sum of squared deviations of columns [begin, end) of x [rows, columns], in two passes and in double.
void ColumnMoments(const float* x, int64_t rows, int64_t columns, int64_t begin, int64_t end, double* mean, double* m2);
void ColumnMoments(const double* x, int64_t rows, int64_t columns, int64_t begin, int64_t end, double* mean,
                   double* m2);

// out = Swish(a), a = (y − mean) · inv · weight + bias by column; y, out [rows, columns].
template <typename T>
struct NormSwish {
  int64_t rows, columns;
  const T* y;
  const T* mean;
  const T* inv;
  const T* weight;
  const T* bias;
  T* out;
};
void Forward(const NormSwish<float>& norm, int64_t begin, int64_t end);
void Forward(const NormSwish<double>& norm, int64_t begin, int64_t end);

// Over columns [begin, end). by_batch: mean and inv are the batch's own and the gradient flows through them.
template <typename T>
struct NormSwishGradient {
  int64_t rows, columns;
  bool by_batch;
  const T* y;
  const T* mean;
  const T* inv;
  const T* weight;
  const T* bias;
  const T* dout;
  T* dy;       // [rows, columns]
  T* dweight;  // [columns]
  T* dbias;    // [columns]
};
void Backward(const NormSwishGradient<float>& norm, int64_t begin, int64_t end);
void Backward(const NormSwishGradient<double>& norm, int64_t begin, int64_t end);

// z = Σ_e (g_e + u_e) E_e: the gate's mixture plus, where there is one, the self gate's residual.
//   g = softmax(gate_logits [rows, experts]); u = softmax of self_logits over experts [own, own + self_count), or σ of
//   it where self_count is 1; 0 for the others. self_count 0: no self gate.
// Expert e's output is block[e] [rows, width], with row distance ld_block[e].
template <typename T>
struct Mixture {
  int64_t width, experts, own, self_count;
  const T* const* block;
  const int64_t* ld_block;
  const T* gate_logits;
  int64_t ld_gate;
  const T* self_logits;
  int64_t ld_self;
  T* g;  // [rows, experts]
  T* u;  // [rows, self_count]
  T* z;  // [rows, width]
};
void Forward(const Mixture<float>& mixture, int64_t begin, int64_t end);
void Forward(const Mixture<double>& mixture, int64_t begin, int64_t end);

template <typename T>
struct MixtureGradient {
  int64_t width, experts, own, self_count;
  const T* const* block;
  const int64_t* ld_block;
  const T* g;
  const T* u;
  const T* dz;       // [rows, width]
  T* const* dblock;  // as block, row distance ld_block
  T* dgate;          // [rows, experts] of the logits
  T* dself;          // [rows, self_count] of the logits
};
void Backward(const MixtureGradient<float>& mixture, int64_t begin, int64_t end);
void Backward(const MixtureGradient<double>& mixture, int64_t begin, int64_t end);

}  // namespace hearth::kernels
