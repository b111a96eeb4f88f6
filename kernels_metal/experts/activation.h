// The activation between an expert's two projections in and the one out. No infinity on the way: exponents are clamped.

#ifndef MLX_ROTOR_EXPERTS_ACTIVATION_H
#define MLX_ROTOR_EXPERTS_ACTIVATION_H

#include "../common/eight.h"

static inline float sigmoid_of(float x) {
  return 1.0f / (1.0f + exp(fmin(-x, 80.0f)));
}

// silu(gate) · up
struct SwiGlu {
  static inline float apply(float gate, float up) {
    return gate * sigmoid_of(gate) * up;
  }
};

// gelu(gate) · up, gelu by its tanh form: 1 + tanh(x) is 2 sigmoid(2 x).
struct GeGlu {
  static inline float apply(float gate, float up) {
    const float near = clamp(gate, -100.0f, 100.0f);
    return gate * sigmoid_of(1.5957691216f * near * fma(0.044715f * near, near, 1.0f)) * up;
  }
};

// gpt-oss's: both clamped, up from 1 on.
struct GptOss {
  static inline float apply(float gate, float up) {
    gate = fmin(gate, 7.0f);
    return gate * sigmoid_of(1.702f * gate) * (clamp(up, -7.0f, 7.0f) + 1.0f);
  }
};

#endif
