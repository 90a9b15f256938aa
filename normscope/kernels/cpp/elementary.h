// The activations. exp, tanh and erf of float are straight-line code, so that loops over them become vector code.
//
// Included by bodies.h inside the namespace of an instruction set and of a Number. The coefficients are least-squares fits
// on Chebyshev nodes (scripts/fit_erf.py). NaN passes through all of them.

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

// As exact as the library has them.
inline double exp_(double x) { return std::exp(x); }
inline double tanh_(double x) { return std::tanh(x); }
inline double expm1_(double x) { return std::expm1(x); }
inline double erf_(double x) { return std::erf(x); }

constexpr Number kRootOfTwoOverPi = Number(0.79788456080286535588), kCubic = Number(0.044715);

inline Number sigmoid_(Number x) { return 1 / (1 + exp_(-x)); }

inline Number normal_(Number x) { return Number(0.5) * (1 + erf_(x * Number(0.70710678118654752440))); }  // Φ

inline Number gelu_tanh_(Number x) { return tanh_(kRootOfTwoOverPi * (x + kCubic * x * x * x)); }

// tanh(ln(1 + e^x)) = w/(w + 2) with w = e^x (e^x + 2); 1 in either Number from 20 on.
inline Number tanh_softplus_(Number x) {
  const Number e = exp_(x > 20 ? Number(20) : x), w = e * (e + 2);
  return w / (w + 2);
}

struct Relu {
  static Number value(Number z) { return z < 0 ? 0 : z; }  // NaN passes: NaN < 0 is false
  static Number slope(Number z) { return z <= 0 ? 0 : 1; }
};
struct Relu6 {
  static Number value(Number z) { return z < 0 ? 0 : z > 6 ? 6 : z; }
  static Number slope(Number z) { return z <= 0 || z >= 6 ? 0 : 1; }
};
struct LeakyRelu {
  static Number value(Number z) { return z > 0 ? z : z * Number(0.01); }
  static Number slope(Number z) { return z > 0 ? 1 : Number(0.01); }
};
struct Elu {
  static Number value(Number z) { return z > 0 ? z : expm1_(z); }
  static Number slope(Number z) { return z > 0 ? 1 : exp_(z); }
};
struct Silu {
  static Number value(Number z) { return z * sigmoid_(z); }
  static Number slope(Number z) {
    const Number s = sigmoid_(z);
    return s * (1 + z * (1 - s));
  }
};
struct Gelu {
  static Number value(Number z) { return z * normal_(z); }
  static Number slope(Number z) { return normal_(z) + z * Number(0.39894228040143267794) * exp_(-Number(0.5) * z * z); }
};
struct GeluTanh {
  static Number value(Number z) { return Number(0.5) * z * (1 + gelu_tanh_(z)); }
  static Number slope(Number z) {
    const Number t = gelu_tanh_(z);
    return Number(0.5) * (1 + t) + Number(0.5) * z * (1 - t * t) * kRootOfTwoOverPi * (1 + 3 * kCubic * z * z);
  }
};
struct Mish {
  static Number value(Number z) { return z * tanh_softplus_(z); }
  static Number slope(Number z) {
    const Number t = tanh_softplus_(z);
    return t + z * (1 - t * t) * sigmoid_(z);
  }
};
struct Sigmoid {
  static Number value(Number z) { return sigmoid_(z); }
  static Number slope(Number z) {
    const Number s = sigmoid_(z);
    return s * (1 - s);
  }
};
struct Tanh {
  static Number value(Number z) { return tanh_(z); }
  static Number slope(Number z) {
    const Number t = tanh_(z);
    return 1 - t * t;
  }
};
struct Hardswish {
  static Number value(Number z) {
    const Number v = z + 3;
    return z * (v < 0 ? 0 : v > 6 ? 6 : v) / 6;
  }
  static Number slope(Number z) { return z <= -3 ? 0 : z < 3 ? z / 3 + Number(0.5) : 1; }
};
struct Hardsigmoid {
  static Number value(Number z) {
    const Number v = z + 3;
    return (v < 0 ? 0 : v > 6 ? 6 : v) / 6;
  }
  static Number slope(Number z) { return z > -3 && z < 3 ? Number(1) / 6 : 0; }
};
