// exp, tanh and erf as straight-line float code, so that loops over them become vector code.
//
// Included inside the namespace of an instruction set by bodies.h. The coefficients are least-squares fits on Chebyshev nodes (scripts/fit_erf.py). NaN passes through all of them.
// e^x to 1.5 units in the last place: x = n·ln 2 + r, |r| ≤ ln 2 / 2.
inline float exp_(float x) {
  const float c = x > 88.3f ? 88.3f : x < -87.3f ? -87.3f : x;
  const float n = (c * 1.44269504f + 12582912.f) - 12582912.f;  // rounds to the nearest integer
  const float r = (c - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts
  float p = 1.989927622e-04f;
  p = p * r + 1.393364352e-03f;
  p = p * r + 8.333298480e-03f;
  p = p * r + 4.166646498e-02f;
  p = p * r + 1.666666672e-01f;
  p = p * r + 5.000000013e-01f;
  p = p * r * r + r + 1.f;
  const int32_t bits = (static_cast<int32_t>(n) + 127) << 23;
  float scale;
  std::memcpy(&scale, &bits, 4);
  return p * scale;
}

inline float sigmoid_(float x) { return 1.f / (1.f + exp_(-x)); }

inline float tanh_(float x) {
  const float s = x * x;
  float p = -6.155063270e-03f;
  p = p * s + 2.104556368e-02f;
  p = p * s - 5.386387907e-02f;
  p = p * s + 1.333289020e-01f;
  p = p * s - 3.333333139e-01f;
  const float near = x + x * s * p, far = 1.f - 2.f / (exp_(2.f * x) + 1.f);
  return s < 0.390625f ? near : far;
}

// e^x − 1 without the loss of digits near 0.
inline float expm1_(float x) {
  const float t = tanh_(x * 0.5f);
  return x > -1.f && x < 1.f ? 2.f * t / (1.f - t) : exp_(x) - 1.f;
}

inline float erf_(float x) {
  const float a = x < 0 ? -x : x, s = x * x, t = a > 4.f ? 4.f : a;
  float p = 7.933412055e-05f;
  p = p * s - 8.034819015e-04f;
  p = p * s + 5.191214757e-03f;
  p = p * s - 2.685539715e-02f;
  p = p * s + 1.128362565e-01f;
  p = p * s - 3.761262987e-01f;
  p = p * s + 1.283791666e-01f;
  float q = 1.795181735e-06f;
  q = q * t - 2.925760683e-05f;
  q = q * t + 1.860277273e-04f;
  q = q * t - 4.020034945e-04f;
  q = q * t - 2.045896645e-03f;
  q = q * t + 2.159430939e-02f;
  q = q * t - 1.044595019e-01f;
  q = q * t - 6.359580269e-01f;
  q = q * t - 1.128492956e+00f;
  const float far = 1.f - exp_(t * q), near = x + x * p;
  return a < 1.f ? near : x < 0 ? -far : x > 0 ? far : x;
}

inline float normal_(float x) { return 0.5f * (1.f + erf_(x * 0.70710678f)); }  // Φ

inline float gelu_tanh_(float x) { return tanh_(0.79788456f * (x + 0.044715f * x * x * x)); }

// tanh(ln(1 + e^x)) = w/(w + 2) with w = e^x (e^x + 2); 1 in float from 20 on.
inline float tanh_softplus_(float x) {
  const float e = exp_(x > 20.f ? 20.f : x), w = e * (e + 2.f);
  return w / (w + 2.f);
}

struct Relu {
  static float value(float z) { return z < 0 ? 0.f : z; }  // NaN passes: NaN < 0 is false
  static float slope(float z) { return z <= 0 ? 0.f : 1.f; }
};
struct Relu6 {
  static float value(float z) { return z < 0 ? 0.f : z > 6 ? 6.f : z; }
  static float slope(float z) { return z <= 0 || z >= 6 ? 0.f : 1.f; }
};
struct LeakyRelu {
  static float value(float z) { return z > 0 ? z : z * 0.01f; }
  static float slope(float z) { return z > 0 ? 1.f : 0.01f; }
};
struct Elu {
  static float value(float z) { return z > 0 ? z : expm1_(z); }
  static float slope(float z) { return z > 0 ? 1.f : exp_(z); }
};
struct Silu {
  static float value(float z) { return z * sigmoid_(z); }
  static float slope(float z) {
    const float s = sigmoid_(z);
    return s * (1.f + z * (1.f - s));
  }
};
struct Gelu {
  static float value(float z) { return z * normal_(z); }
  static float slope(float z) { return normal_(z) + z * 0.39894228f * exp_(-0.5f * z * z); }
};
struct GeluTanh {
  static float value(float z) { return 0.5f * z * (1.f + gelu_tanh_(z)); }
  static float slope(float z) {
    const float t = gelu_tanh_(z);
    return 0.5f * (1.f + t) + 0.5f * z * (1.f - t * t) * 0.79788456f * (1.f + 3 * 0.044715f * z * z);
  }
};
struct Mish {
  static float value(float z) { return z * tanh_softplus_(z); }
  static float slope(float z) {
    const float t = tanh_softplus_(z);
    return t + z * (1.f - t * t) * sigmoid_(z);
  }
};
struct Sigmoid {
  static float value(float z) { return sigmoid_(z); }
  static float slope(float z) {
    const float s = sigmoid_(z);
    return s * (1.f - s);
  }
};
struct Tanh {
  static float value(float z) { return tanh_(z); }
  static float slope(float z) {
    const float t = tanh_(z);
    return 1.f - t * t;
  }
};
struct Hardswish {
  static float value(float z) {
    const float v = z + 3;
    return z * (v < 0 ? 0.f : v > 6 ? 6.f : v) / 6;
  }
  static float slope(float z) { return z <= -3 ? 0.f : z < 3 ? z / 3 + 0.5f : 1.f; }
};
struct Hardsigmoid {
  static float value(float z) {
    const float v = z + 3;
    return (v < 0 ? 0.f : v > 6 ? 6.f : v) / 6;
  }
  static float slope(float z) { return z > -3 && z < 3 ? 1.f / 6 : 0.f; }
};
