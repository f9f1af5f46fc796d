// Products of weights in 8 and 4 bits on tensor cores, beside plain C++.

#include "grouping.h"

namespace testing {
namespace {

struct Format {
  WeightFormat format;
  int64_t group;  // 0: a row
  bool zeros = false;
};

// Weights [E, N, M] by chance.
struct Codes {
  const Format& f;
  int64_t N, M, S, Z;
  Array<uint8_t> values, zeros;
  Array<uint32_t> scales;  // by any format's bytes
  std::vector<double> exact_scales;

  Codes(const Format& f, int64_t E, int64_t N, int64_t M)
      : f(f),
        N(N),
        M(M),
        S(f.group ? M / f.group : 1),
        Z((S + 1) / 2),
        values(E * N * M * bits_of(f.format) / 8),
        zeros(E * N * Z),
        scales((E * N * S * bytes() + 3) / 4) {
    for (int64_t i = 0; i < values.size(); ++i) values[i] = static_cast<uint8_t>(below(256));
    for (int64_t i = 0; i < zeros.size(); ++i) zeros[i] = static_cast<uint8_t>(below(256));
    for (int64_t i = 0; i < E * N * S; ++i) {
      const auto put = [&](auto scale, double exact) {
        std::memcpy(reinterpret_cast<char*>(scales.data()) + i * bytes(), &scale, bytes());
        exact_scales.push_back(exact);
      };
      const auto wide = static_cast<float>(0.02 * (1 + below(8)));
      if (f.format == WeightFormat::kMxfp4) {
        const auto exponent = static_cast<uint8_t>(below(6) ? 118 + below(6) : 0);
        put(exponent, std::ldexp(1.0, exponent - 127));
      } else if (f.format == WeightFormat::kInt4) {
        put(make<__nv_bfloat16>(wide), number(make<__nv_bfloat16>(wide)));
      } else {
        put(wide, wide);
      }
    }
  }
  // The bytes of a scale: an exponent, a bfloat16 or a float.
  int64_t bytes() const {
    return f.format == WeightFormat::kMxfp4 ? 1 : f.format == WeightFormat::kInt4 ? 2 : 4;
  }

  // Number m of line n, counted through all experts.
  double at(int64_t n, int64_t m) {
    const int64_t group = f.group ? m / f.group : 0;
    const double scale = exact_scales[n * S + group];
    if (f.format == WeightFormat::kInt8) return scale * static_cast<int8_t>(values[n * M + m]);
    const int code = values[(n * M + m) / 2] >> m % 2 * 4 & 15;
    if (f.zeros) return scale * (code - (zeros[n * Z + group / 2] >> group % 2 * 4 & 15));
    return scale * static_cast<double>(numbers_of(f.format).of[code]);
  }
};

template <typename T>
void test_product(const Case& c, const Format& f) {
  context = "weights of format " + std::to_string(static_cast<int>(f.format)) + ", group " +
            std::to_string(f.group) + ", " + text(c);
  Grouping g(c);
  const int64_t lines = c.transposed ? c.M : c.N, width = c.transposed ? c.N : c.M;
  Codes codes(f, g.E, lines, width);
  Array<T> rows = filled<T>(g.R * c.M), bias = filled<T>(g.E * c.N), out(g.R * c.N);
  // Rows of nobody are not read.
  g.each_other(c.M, [&](int64_t i) { rows[i] = make<T>(NAN); });
  quantized_mm(
      {dtype_of<T>, rows.data(), f.format, codes.values.data(), codes.scales.data(),
       f.zeros ? codes.zeros.data() : nullptr, codes.S, c.transposed, g.groups(), c.M, c.N},
      c.bias ? bias.data() : nullptr, out.data(), nullptr);
  g.each_row([&](int e, int64_t r) {
    for (int64_t n = 0; n < c.N; ++n) {
      ExactSum sum;
      if (c.bias) sum.add(number(bias[e * c.N + n]));
      for (int64_t m = 0; m < c.M; ++m) {
        const double weight =
            c.transposed ? codes.at(e * lines + m, n) : codes.at(e * lines + n, m);
        // As the kernel rounds them.
        sum.add(number(rows[r * c.M + m]) * number(make<T>(weight)));
      }
      CHECK(is_near(out[r * c.N + n], sum, {0, 8.0 + c.M / 8.0}));
    }
  });
  g.check_others(out, c.N, 0);
}

void test_all() {
  const Format formats[] = {{WeightFormat::kInt8, 0},        {WeightFormat::kInt4, 32},
                            {WeightFormat::kInt4, 64, true}, {WeightFormat::kInt4, 128},
                            {WeightFormat::kMxfp4, 32},      {WeightFormat::kNf4, 64}};
  using A = Activation;
  const Case cases[] = {
      {{}, -1, 1, 128, 16, A::kRelu, false, false},
      {{1}, -1, 1, 128, 8, A::kRelu, false, false},
      {{0, 70, 1}, -1, 2, 384, 136, A::kRelu, false, false, false},
      {{5, 0, 130}, 150, 1, 256, 24, A::kRelu, false, false},
      {{3, 66}, -1, 1, 40, 384, A::kRelu, true, false, false},
      {{131, 90}, 140, 1, 136, 128, A::kRelu, true, false, false},
  };
  int turn = 0;
  for (const Case& c : cases) {
    for (const Format& f : formats) {
      cusim::options().card = kCards[turn++ % 2];
      test_product<__nv_bfloat16>(c, f);
      test_product<__half>(c, f);
    }
  }
  // A slice of 8 bits that ends within a thread's numbers.
  test_product<__half>({{40}, -1, 1, 80, 16, A::kRelu, false, false}, formats[0]);
  test_product<__half>({{40}, -1, 1, 16, 80, A::kRelu, true, false, false}, formats[0]);
  // Columns that end within a tile.
  for (const Format& f : {formats[4], formats[1]}) {
    test_product<__half>({{40}, -1, 1, 8, 160, A::kRelu, true, false, false}, f);
  }
  cusim::options().card = cusim::kLeast;
}

const Registration registration("quantized", test_all, {{"quantized_mm", 128}});

}  // namespace
}  // namespace testing
