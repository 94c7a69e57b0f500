#include "model/kernels.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

// One body, compiled for several instruction sets and dispatched when the program is loaded. Bodies are inlined into
// the clones, so that each clone has its own vectorised loops.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(__SANITIZE_ADDRESS__) && \
    !defined(__SANITIZE_THREAD__)
#define HEARTH_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define HEARTH_CLONES
#endif
#define HEARTH_BODY inline __attribute__((always_inline))

namespace hearth::kernels {
namespace {

constexpr int kLanes = 16;  // of a sum within a row: fixed, whatever the vector width

// exp by 2^n · polynomial (Cephes' coefficients): within 2 ulp, and the compiler can vectorise it. Beyond ±87 it
// saturates, which a sigmoid does not notice.
HEARTH_BODY float Exp(float x) {
  x = x > 87.0f ? 87.0f : x;
  x = x < -87.0f ? -87.0f : x;
  const float shifted =
      x * 1.44269504088896341f + 12582912.0f;  // 1.5 · 2^23: the sum's low bits are the rounded integer
  const float n = shifted - 12582912.0f;
  float r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  int32_t bits;
  std::memcpy(&bits, &shifted, sizeof(bits));
  bits = static_cast<int32_t>((static_cast<uint32_t>(bits) - 0x4b400000u + 127u) << 23);
  float power;
  std::memcpy(&power, &bits, sizeof(power));
  return p * power;
}
HEARTH_BODY double Exp(double x) { return std::exp(x); }

// NaN stays NaN: a bad batch has to be noticed.
template <typename T>
HEARTH_BODY T Sigmoid(T x) {
  return x == x ? T(1) / (T(1) + Exp(-x)) : x;
}

template <typename T>
HEARTH_BODY T SumLanes(const T* sum) {
  T total = 0;
  for (int lane = 0; lane < kLanes; ++lane) total += sum[lane];
  return total;
}

template <typename T>
HEARTH_BODY T Dot(const T* a, const T* b, int64_t n) {
  T sum[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int lane = 0; lane < kLanes; ++lane) sum[lane] += a[i + lane] * b[i + lane];
  }
  T rest = 0;
  for (; i < n; ++i) rest += a[i] * b[i];
  return SumLanes(sum) + rest;
}

template <typename T>
HEARTH_BODY void Softmax(const T* logits, int64_t n, T* out) {
  T largest = logits[0];
  for (int64_t i = 1; i < n; ++i) largest = std::max(largest, logits[i]);
  T sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += out[i] = std::exp(logits[i] - largest);
  for (int64_t i = 0; i < n; ++i) out[i] /= sum;
}

// dlogits = p ⊙ (dp − p·dp), in place.
template <typename T>
HEARTH_BODY void SoftmaxGradient(const T* p, int64_t n, T* d) {
  T dot = 0;
  for (int64_t i = 0; i < n; ++i) dot += p[i] * d[i];
  for (int64_t i = 0; i < n; ++i) d[i] = p[i] * (d[i] - dot);
}

template <typename T>
HEARTH_BODY void FeatureGateBody(const FeatureGate<T>& gate, int64_t begin, int64_t end) {
  const int64_t width = gate.width;
  for (int64_t row = begin; row < end; ++row) {
    T* m = gate.m + row * gate.subspaces;
    Softmax(gate.mix_logits + row * gate.ld_mix, gate.subspaces, m);
    T* __restrict x = gate.x + row * width;
    const T* __restrict v = gate.v + row * gate.ld_v;
    for (int64_t l = 0; l < gate.subspaces; ++l) {
      T* __restrict s = gate.s + (l * gate.rows + row) * width;
      const T twice = 2 * m[l];
      if (l == 0) {
        for (int64_t j = 0; j < width; ++j) {
          s[j] = Sigmoid(s[j]);
          x[j] = twice * s[j];
        }
      } else {
        for (int64_t j = 0; j < width; ++j) {
          s[j] = Sigmoid(s[j]);
          x[j] += twice * s[j];
        }
      }
    }
    for (int64_t j = 0; j < width; ++j) x[j] *= v[j];
  }
}

template <typename T>
HEARTH_BODY void FeatureGateGradientBody(const FeatureGateGradient<T>& gate, int64_t begin, int64_t end) {
  const int64_t width = gate.width;
  for (int64_t row = begin; row < end; ++row) {
    const T* m = gate.m + row * gate.subspaces;
    T* dmix = gate.dmix + row * gate.subspaces;
    const T* __restrict v = gate.v + row * gate.ld_v;
    const T* __restrict dx = gate.dx + row * width;
    T* __restrict dv = gate.dv + row * width;
    for (int64_t j = 0; j < width; ++j) dv[j] = 0;
    for (int64_t l = 0; l < gate.subspaces; ++l) {
      const T* __restrict s = gate.s + (l * gate.rows + row) * width;
      T* __restrict da = gate.da + (l * gate.rows + row) * width;
      const T twice = 2 * m[l];
      T sum[kLanes] = {};
      int64_t j = 0;
      for (; j + kLanes <= width; j += kLanes) {
        for (int lane = 0; lane < kLanes; ++lane) {
          const T sigmoid = s[j + lane];
          const T d = dx[j + lane];
          const T dgate = d * v[j + lane];
          dv[j + lane] += d * (twice * sigmoid);
          sum[lane] += dgate * sigmoid;
          da[j + lane] = dgate * twice * (sigmoid * (1 - sigmoid));
        }
      }
      T rest = 0;
      for (; j < width; ++j) {
        const T dgate = dx[j] * v[j];
        dv[j] += dx[j] * (twice * s[j]);
        rest += dgate * s[j];
        da[j] = dgate * twice * (s[j] * (1 - s[j]));
      }
      dmix[l] = 2 * (SumLanes(sum) + rest);
    }
    SoftmaxGradient(m, gate.subspaces, dmix);
  }
}

template <typename T>
HEARTH_BODY void ColumnMomentsBody(const T* x, int64_t rows, int64_t columns, int64_t begin, int64_t end,
                                   double* __restrict mean, double* __restrict m2) {
  for (int64_t c = begin; c < end; ++c) mean[c] = 0;
  for (int64_t row = 0; row < rows; ++row) {
    const T* __restrict in = x + row * columns;
    for (int64_t c = begin; c < end; ++c) mean[c] += static_cast<double>(in[c]);
  }
  for (int64_t c = begin; c < end; ++c) {
    mean[c] /= static_cast<double>(rows);
    m2[c] = 0;
  }
  for (int64_t row = 0; row < rows; ++row) {
    const T* __restrict in = x + row * columns;
    for (int64_t c = begin; c < end; ++c) {
      const double deviation = static_cast<double>(in[c]) - mean[c];
      m2[c] += deviation * deviation;
    }
  }
}

template <typename T>
HEARTH_BODY void NormSwishBody(const NormSwish<T>& norm, int64_t begin, int64_t end) {
  const T* __restrict mean = norm.mean;
  const T* __restrict inv = norm.inv;
  const T* __restrict weight = norm.weight;
  const T* __restrict bias = norm.bias;
  for (int64_t row = begin; row < end; ++row) {
    const T* __restrict y = norm.y + row * norm.columns;
    T* __restrict out = norm.out + row * norm.columns;
    for (int64_t c = 0; c < norm.columns; ++c) {
      const T a = (y[c] - mean[c]) * inv[c] * weight[c] + bias[c];
      out[c] = a * Sigmoid(a);
    }
  }
}

template <typename T>
HEARTH_BODY void NormSwishGradientBody(const NormSwishGradient<T>& norm, int64_t begin, int64_t end) {
  const T* __restrict mean = norm.mean;
  const T* __restrict inv = norm.inv;
  const T* __restrict weight = norm.weight;
  const T* __restrict bias = norm.bias;
  const int64_t width = end - begin;
  std::vector<double> sums(2 * width, 0.0);
  double* __restrict sum = sums.data();              // Σ da
  double* __restrict sum_hat = sums.data() + width;  // Σ da · ŷ
  for (int64_t row = 0; row < norm.rows; ++row) {
    const T* __restrict y = norm.y + row * norm.columns;
    const T* __restrict dout = norm.dout + row * norm.columns;
    T* __restrict dy = norm.dy + row * norm.columns;
    for (int64_t i = 0; i < width; ++i) {
      const int64_t c = begin + i;
      const T hat = (y[c] - mean[c]) * inv[c];
      const T a = hat * weight[c] + bias[c];
      const T sigmoid = Sigmoid(a);
      const T da = dout[c] * (sigmoid * (1 + a * (1 - sigmoid)));
      dy[c] = da;
      sum[i] += static_cast<double>(da);
      sum_hat[i] += static_cast<double>(da * hat);
    }
  }
  std::vector<T> means(2 * width);
  T* __restrict of_da = means.data();
  T* __restrict of_da_hat = means.data() + width;
  for (int64_t i = 0; i < width; ++i) {
    norm.dbias[begin + i] = static_cast<T>(sum[i]);
    norm.dweight[begin + i] = static_cast<T>(sum_hat[i]);
    of_da[i] = norm.by_batch ? static_cast<T>(sum[i] / static_cast<double>(norm.rows)) : T(0);
    of_da_hat[i] = norm.by_batch ? static_cast<T>(sum_hat[i] / static_cast<double>(norm.rows)) : T(0);
  }
  for (int64_t row = 0; row < norm.rows; ++row) {
    const T* __restrict y = norm.y + row * norm.columns;
    T* __restrict dy = norm.dy + row * norm.columns;
    for (int64_t i = 0; i < width; ++i) {
      const int64_t c = begin + i;
      const T hat = (y[c] - mean[c]) * inv[c];
      dy[c] = weight[c] * inv[c] * (dy[c] - of_da[i] - hat * of_da_hat[i]);
    }
  }
}

template <typename T>
HEARTH_BODY void MixtureBody(const Mixture<T>& mixture, int64_t begin, int64_t end) {
  const int64_t width = mixture.width;
  for (int64_t row = begin; row < end; ++row) {
    T* g = mixture.g + row * mixture.experts;
    Softmax(mixture.gate_logits + row * mixture.ld_gate, mixture.experts, g);
    T* u = mixture.u + row * mixture.self_count;
    if (mixture.self_count == 1) {
      const T logit = mixture.self_logits[row * mixture.ld_self];
      u[0] = T(1) / (T(1) + std::exp(-logit));
    } else if (mixture.self_count > 1) {
      Softmax(mixture.self_logits + row * mixture.ld_self, mixture.self_count, u);
    }
    T* __restrict z = mixture.z + row * width;
    for (int64_t j = 0; j < width; ++j) z[j] = 0;
    for (int64_t e = 0; e < mixture.experts; ++e) {
      const bool own = e >= mixture.own && e < mixture.own + mixture.self_count;
      const T w = own ? g[e] + u[e - mixture.own] : g[e];
      const T* __restrict in = mixture.block[e] + row * mixture.ld_block[e];
      for (int64_t j = 0; j < width; ++j) z[j] += w * in[j];
    }
  }
}

template <typename T>
HEARTH_BODY void MixtureGradientBody(const MixtureGradient<T>& mixture, int64_t begin, int64_t end) {
  const int64_t width = mixture.width;
  for (int64_t row = begin; row < end; ++row) {
    const T* g = mixture.g + row * mixture.experts;
    const T* u = mixture.u + row * mixture.self_count;
    T* dgate = mixture.dgate + row * mixture.experts;
    T* dself = mixture.dself + row * mixture.self_count;
    const T* __restrict dz = mixture.dz + row * width;
    for (int64_t e = 0; e < mixture.experts; ++e) {
      const bool own = e >= mixture.own && e < mixture.own + mixture.self_count;
      const T w = own ? g[e] + u[e - mixture.own] : g[e];
      const T* in = mixture.block[e] + row * mixture.ld_block[e];
      T* __restrict din = mixture.dblock[e] + row * mixture.ld_block[e];
      for (int64_t j = 0; j < width; ++j) din[j] = w * dz[j];
      dgate[e] = Dot(dz, in, width);
      if (own) dself[e - mixture.own] = dgate[e];
    }
    SoftmaxGradient(g, mixture.experts, dgate);
    if (mixture.self_count == 1) {
      dself[0] *= u[0] * (1 - u[0]);
    } else if (mixture.self_count > 1) {
      SoftmaxGradient(u, mixture.self_count, dself);
    }
  }
}

}  // namespace

#define HEARTH_RANGE_KERNEL(Name, Struct, Body)                                                                        \
  HEARTH_CLONES void Name(const Struct<float>& arguments, int64_t begin, int64_t end) { Body(arguments, begin, end); } \
  HEARTH_CLONES void Name(const Struct<double>& arguments, int64_t begin, int64_t end) { Body(arguments, begin, end); }

HEARTH_RANGE_KERNEL(Forward, FeatureGate, FeatureGateBody)
HEARTH_RANGE_KERNEL(Backward, FeatureGateGradient, FeatureGateGradientBody)
HEARTH_RANGE_KERNEL(Forward, NormSwish, NormSwishBody)
HEARTH_RANGE_KERNEL(Backward, NormSwishGradient, NormSwishGradientBody)
HEARTH_RANGE_KERNEL(Forward, Mixture, MixtureBody)
HEARTH_RANGE_KERNEL(Backward, MixtureGradient, MixtureGradientBody)

HEARTH_CLONES void ColumnMoments(const float* x, int64_t rows, int64_t columns, int64_t begin, int64_t end,
                                 double* mean, double* m2) {
  ColumnMomentsBody(x, rows, columns, begin, end, mean, m2);
}
HEARTH_CLONES void ColumnMoments(const double* x, int64_t rows, int64_t columns, int64_t begin, int64_t end,
                                 double* mean, double* m2) {
  ColumnMomentsBody(x, rows, columns, begin, end, mean, m2);
}

}  // namespace hearth::kernels
