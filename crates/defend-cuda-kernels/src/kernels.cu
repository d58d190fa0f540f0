// What a transformer block does between its matrix products, for f32, bf16 and f16; arithmetic is always f32.
//
// Rows are contiguous and a multiple of 8 values long, so that a thread moves 16 bytes at a time. A warp works on a row.
// No sum depends on the order in which blocks run: the same input gives the same bits.

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace {

constexpr int WARPS = 8;
constexpr int COLUMN_ROWS = 8;

__device__ __forceinline__ float up(float v) { return v; }
__device__ __forceinline__ float up(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ __forceinline__ float up(__half v) { return __half2float(v); }

template <typename T> __device__ __forceinline__ T down(float v);
template <> __device__ __forceinline__ float down<float>(float v) { return v; }
template <> __device__ __forceinline__ __nv_bfloat16 down<__nv_bfloat16>(float v) { return __float2bfloat16(v); }
template <> __device__ __forceinline__ __half down<__half>(float v) { return __float2half(v); }

// 16 bytes of values.
template <typename T> struct alignas(16) Pack {
    static constexpr int N = 16 / sizeof(T);
    T v[N];
};

template <typename T> __device__ __forceinline__ Pack<T> load(const T *p) { return *reinterpret_cast<const Pack<T> *>(p); }
template <typename T> __device__ __forceinline__ void store(T *p, Pack<T> v) { *reinterpret_cast<Pack<T> *>(p) = v; }

__device__ __forceinline__ float warp_sum(float v) {
    for (int lane = 16; lane > 0; lane /= 2) v += __shfl_xor_sync(0xffffffffu, v, lane);
    return v;
}

__device__ __forceinline__ float warp_max(float v) {
    for (int lane = 16; lane > 0; lane /= 2) v = fmaxf(v, __shfl_xor_sync(0xffffffffu, v, lane));
    return v;
}

// Row of this warp.
__device__ __forceinline__ size_t warp_row() { return (size_t)blockIdx.x * WARPS + threadIdx.y; }

// Mean and 1 / standard deviation of a row, in two passes.
template <typename T> __device__ float2 moments(const T *x, int width, float eps) {
    constexpr int N = Pack<T>::N;
    float sum = 0.f;
    for (int i = threadIdx.x * N; i < width; i += 32 * N) {
        Pack<T> p = load(x + i);
        for (int j = 0; j < N; j++) sum += up(p.v[j]);
    }
    const float mean = warp_sum(sum) / width;
    float squares = 0.f;
    for (int i = threadIdx.x * N; i < width; i += 32 * N) {
        Pack<T> p = load(x + i);
        for (int j = 0; j < N; j++) {
            const float c = up(p.v[j]) - mean;
            squares += c * c;
        }
    }
    return make_float2(mean, rsqrtf(warp_sum(squares) / width + eps));
}

// One row of LayerNorm; its moments go to `kept` [2] where that is given.
template <typename T>
__device__ void norm_row(const T *x, const T *w, const T *b, T *out, float *kept, int width, float eps) {
    constexpr int N = Pack<T>::N;
    const float2 m = moments(x, width, eps);
    if (kept && threadIdx.x == 0) {
        kept[0] = m.x;
        kept[1] = m.y;
    }
    for (int i = threadIdx.x * N; i < width; i += 32 * N) {
        Pack<T> p = load(x + i), scale = load(w + i), shift = load(b + i), o;
        for (int j = 0; j < N; j++) o.v[j] = down<T>((up(p.v[j]) - m.x) * m.y * up(scale.v[j]) + up(shift.v[j]));
        store(out + i, o);
    }
}

// LayerNorm of rows; moments [rows, 2] or null.
template <typename T>
__device__ void layer_norm(const T *x, const T *w, const T *b, T *out, float *kept, int rows, int width, float eps) {
    const size_t row = warp_row();
    if (row >= rows) return;
    norm_row(x + row * width, w, b, out + row * width, kept ? kept + 2 * row : nullptr, width, eps);
}

// dx = residual + the gradient of LayerNorm's input; residual may be null.
template <typename T>
__device__ void layer_norm_backward(const T *x, const float *kept, const T *w, const T *g, const T *residual, T *dx, int rows,
                                    int width) {
    constexpr int N = Pack<T>::N;
    const size_t row = warp_row();
    if (row >= rows) return;
    const float mean = kept[2 * row], scale = kept[2 * row + 1];
    x += row * width;
    g += row * width;
    float sum = 0.f, product = 0.f;
    for (int i = threadIdx.x * N; i < width; i += 32 * N) {
        Pack<T> p = load(x + i), q = load(g + i), r = load(w + i);
        for (int j = 0; j < N; j++) {
            const float d = up(q.v[j]) * up(r.v[j]);
            sum += d;
            product += d * (up(p.v[j]) - mean) * scale;
        }
    }
    sum = warp_sum(sum) / width;
    product = warp_sum(product) / width;
    for (int i = threadIdx.x * N; i < width; i += 32 * N) {
        Pack<T> p = load(x + i), q = load(g + i), r = load(w + i), o;
        if (residual) o = load(residual + row * width + i);
        for (int j = 0; j < N; j++) {
            const float d = up(q.v[j]) * up(r.v[j]);
            const float normed = (up(p.v[j]) - mean) * scale;
            o.v[j] = down<T>((residual ? up(o.v[j]) : 0.f) + scale * (d - sum - normed * product));
        }
        store(dx + row * width + i, o);
    }
}

// out = x + factor[row / per_factor] * scale * (y + bias), and LayerNorm of it into `normed`; factors, scale and normed may
// be null.
template <typename T>
__device__ void residual(const T *x, const T *y, const T *bias, const float *factors, const T *scale, T *out, const T *w,
                         const T *b, T *normed, float *kept, int rows, int width, int per_factor, float eps) {
    constexpr int N = Pack<T>::N;
    const size_t row = warp_row();
    if (row >= rows) return;
    const float factor = factors ? factors[row / per_factor] : 1.f;
    for (int i = threadIdx.x * N; i < width; i += 32 * N) {
        Pack<T> p = load(y + row * width + i), q = load(bias + i), r = load(x + row * width + i), s;
        if (scale) s = load(scale + i);
        for (int j = 0; j < N; j++) {
            float v = (up(p.v[j]) + up(q.v[j])) * factor;
            if (scale) v *= up(s.v[j]);
            p.v[j] = down<T>(up(r.v[j]) + v);
        }
        store(out + row * width + i, p);
    }
    // A lane reads back what it wrote itself.
    if (normed) norm_row(out + row * width, w, b, normed + row * width, kept ? kept + 2 * row : nullptr, width, eps);
}

// Rows times their image's factor.
template <typename T>
__device__ void scale_rows(const T *x, const float *factors, T *out, int rows, int width, int per_factor) {
    constexpr int N = Pack<T>::N;
    const size_t row = warp_row();
    if (row >= rows) return;
    const float factor = factors[row / per_factor];
    for (int i = threadIdx.x * N; i < width; i += 32 * N) {
        Pack<T> p = load(x + row * width + i);
        for (int j = 0; j < N; j++) p.v[j] = down<T>(up(p.v[j]) * factor);
        store(out + row * width + i, p);
    }
}

__device__ __forceinline__ float gelu(float x) { return 0.5f * x * (1.f + erff(x * 0.70710678118654752f)); }

__device__ __forceinline__ float gelu_derivative(float x) {
    return 0.5f * (1.f + erff(x * 0.70710678118654752f)) + x * 0.39894228040143268f * expf(-0.5f * x * x);
}

// out = y + bias for rows of `width`, or GELU of it.
template <typename T, bool GELU> __device__ void add_bias(const T *y, const T *bias, T *out, unsigned packs, int width) {
    constexpr int N = Pack<T>::N;
    const unsigned at = blockIdx.x * blockDim.x + threadIdx.x;
    if (at >= packs) return;
    Pack<T> p = load(y + (size_t)at * N), q = load(bias + at % (width / N) * N);
    for (int j = 0; j < N; j++) {
        const float v = up(p.v[j]) + up(q.v[j]);
        p.v[j] = down<T>(GELU ? gelu(v) : v);
    }
    store(out + (size_t)at * N, p);
}

// dy = g * gelu'(y + bias).
template <typename T>
__device__ void bias_gelu_backward(const T *y, const T *bias, const T *g, T *dy, unsigned packs, int width) {
    constexpr int N = Pack<T>::N;
    const unsigned at = blockIdx.x * blockDim.x + threadIdx.x;
    if (at >= packs) return;
    Pack<T> p = load(y + (size_t)at * N), q = load(bias + at % (width / N) * N), r = load(g + (size_t)at * N);
    for (int j = 0; j < N; j++) p.v[j] = down<T>(up(r.v[j]) * gelu_derivative(up(p.v[j]) + up(q.v[j])));
    store(dy + (size_t)at * N, p);
}

// Packed rows [B, T, 3, h, d] plus bias [3 h d] as queries [B, h, T, d], times `scale`, and keys and values [B, h, padded, d],
// whose rows from T on are zeros.
template <typename T>
__device__ void split_heads(const T *packed, const T *bias, T *q, T *k, T *v, unsigned packs, int tokens, int padded, int heads,
                            int depth, float scale) {
    constexpr int N = Pack<T>::N;
    const unsigned at = blockIdx.x * blockDim.x + threadIdx.x;
    if (at >= packs) return;
    const int width = heads * depth, columns = 3 * width / N;
    const int column = at % columns * N;
    const unsigned row = at / columns;
    const int token = row % padded, image = row / padded;
    const int part = column / width, head = column % width / depth, channel = column % depth;
    Pack<T> p;
    if (token < tokens) {
        Pack<T> r = load(bias + column);
        p = load(packed + ((size_t)image * tokens + token) * 3 * width + column);
        const float factor = part == 0 ? scale : 1.f;
        for (int j = 0; j < N; j++) p.v[j] = down<T>((up(p.v[j]) + up(r.v[j])) * factor);
    } else {
        if (part == 0) return;
        for (int j = 0; j < N; j++) p.v[j] = down<T>(0.f);
    }
    T *out = part == 0 ? q : part == 1 ? k : v;
    const int rows = part == 0 ? tokens : padded;
    store(out + (((size_t)image * heads + head) * rows + token) * depth + channel, p);
}

// The reverse for gradients: [B, h, T, d], and twice [B, h, padded, d], to [B, T, 3, h, d]; queries times `scale`.
template <typename T>
__device__ void join_heads(const T *q, const T *k, const T *v, T *packed, unsigned packs, int tokens, int padded, int heads,
                           int depth, float scale) {
    constexpr int N = Pack<T>::N;
    const unsigned at = blockIdx.x * blockDim.x + threadIdx.x;
    if (at >= packs) return;
    const int width = heads * depth, columns = 3 * width / N;
    const int column = at % columns * N;
    const unsigned row = at / columns;
    const int token = row % tokens, image = row / tokens;
    const int part = column / width, head = column % width / depth, channel = column % depth;
    const T *from = part == 0 ? q : part == 1 ? k : v;
    const int rows = part == 0 ? tokens : padded;
    Pack<T> p = load(from + (((size_t)image * heads + head) * rows + token) * depth + channel);
    if (part == 0)
        for (int j = 0; j < N; j++) p.v[j] = down<T>(up(p.v[j]) * scale);
    store(packed + (size_t)at * N, p);
}

// [B, first, second, d] to [B, second, first, d].
template <typename T> __device__ void swap_axes(const T *x, T *out, unsigned packs, int first, int second, int depth) {
    constexpr int N = Pack<T>::N;
    const unsigned at = blockIdx.x * blockDim.x + threadIdx.x;
    if (at >= packs) return;
    const int columns = depth / N;
    const unsigned row = at / columns;
    const unsigned j = row % first, i = row / first % second, image = row / first / second;
    store(out + (size_t)at * N, load(x + (((size_t)image * first + j) * second + i) * depth + at % columns * N));
}

// Softmax of the first `width` values of rows that are `stride` apart; zeros behind them. In place.
template <typename T> __device__ void softmax(T *x, int rows, int width, int stride) {
    constexpr int N = Pack<T>::N;
    const size_t row = warp_row();
    if (row >= rows) return;
    x += row * stride;
    float top = -INFINITY;
    for (int i = threadIdx.x * N; i < stride; i += 32 * N) {
        Pack<T> p = load(x + i);
        for (int j = 0; j < N; j++)
            if (i + j < width) top = fmaxf(top, up(p.v[j]));
    }
    top = warp_max(top);
    float sum = 0.f;
    for (int i = threadIdx.x * N; i < stride; i += 32 * N) {
        Pack<T> p = load(x + i);
        for (int j = 0; j < N; j++)
            if (i + j < width) sum += expf(up(p.v[j]) - top);
    }
    const float factor = 1.f / warp_sum(sum);
    for (int i = threadIdx.x * N; i < stride; i += 32 * N) {
        Pack<T> p = load(x + i);
        for (int j = 0; j < N; j++) p.v[j] = down<T>(i + j < width ? expf(up(p.v[j]) - top) * factor : 0.f);
        store(x + i, p);
    }
}

// g becomes p * (g - sum(p * g)), row by row.
template <typename T> __device__ void softmax_backward(const T *p, T *g, int rows, int stride) {
    constexpr int N = Pack<T>::N;
    const size_t row = warp_row();
    if (row >= rows) return;
    p += row * stride;
    g += row * stride;
    float sum = 0.f;
    for (int i = threadIdx.x * N; i < stride; i += 32 * N) {
        Pack<T> a = load(p + i), b = load(g + i);
        for (int j = 0; j < N; j++) sum += up(a.v[j]) * up(b.v[j]);
    }
    sum = warp_sum(sum);
    for (int i = threadIdx.x * N; i < stride; i += 32 * N) {
        Pack<T> a = load(p + i), b = load(g + i);
        for (int j = 0; j < N; j++) b.v[j] = down<T>(up(a.v[j]) * (up(b.v[j]) - sum));
        store(g + i, b);
    }
}

// Sums over each block's rows, [chunks, width]: of g, or with x and its moments [chunks, 2 width]: of g * (x - mean) * scale and
// of g (gradients of LayerNorm's scale and shift).
template <typename T>
__device__ void column_sums(const T *g, const T *x, const float *kept, float *sums, int rows, int width, int per_chunk) {
    __shared__ float partial[2][COLUMN_ROWS][33];
    const int column = blockIdx.y * 32 + threadIdx.x;
    const int from = blockIdx.x * per_chunk, to = min(rows, from + per_chunk);
    float sum = 0.f, product = 0.f;
    if (column < width) {
        for (int row = from + threadIdx.y; row < to; row += COLUMN_ROWS) {
            const float v = up(g[(size_t)row * width + column]);
            sum += v;
            if (x) product += v * (up(x[(size_t)row * width + column]) - kept[2 * row]) * kept[2 * row + 1];
        }
    }
    partial[0][threadIdx.y][threadIdx.x] = sum;
    partial[1][threadIdx.y][threadIdx.x] = product;
    __syncthreads();
    if (threadIdx.y == 0 && column < width) {
        for (int i = 1; i < COLUMN_ROWS; i++) {
            sum += partial[0][i][threadIdx.x];
            product += partial[1][i][threadIdx.x];
        }
        float *chunk = sums + (size_t)blockIdx.x * width * (x ? 2 : 1);
        if (x) chunk[column] = product;
        chunk[(x ? width : 0) + column] = sum;
    }
}

// Sums of the chunks above.
template <typename T> __device__ void join_sums(const float *sums, T *out, int chunks, int width) {
    const int column = blockIdx.x * blockDim.x + threadIdx.x;
    if (column >= width) return;
    float sum = 0.f;
    for (int i = 0; i < chunks; i++) sum += sums[(size_t)i * width + column];
    out[column] = down<T>(sum);
}

// A part of a parameter: which one, and where it starts.
struct Part {
    unsigned parameter, start;
};

template <typename T> struct Slot {
    T *parameter, *moments;
    const T *gradient;
    unsigned long long count;
};

// One step of AdamW for many parameters; the moments are [2, count].
template <typename T>
__device__ void adamw(const Slot<T> *slots, const Part *parts, int per_part, float beta1, float rest1, float beta2, float rest2,
                      float keep, float step, float correction, float eps) {
    const Part part = parts[blockIdx.x];
    const Slot<T> slot = slots[part.parameter];
    const size_t count = slot.count, end = min(count, (size_t)part.start + per_part);
    for (size_t i = part.start + threadIdx.x; i < end; i += blockDim.x) {
        const float g = up(slot.gradient[i]);
        const float m = up(slot.moments[i]) * beta1 + rest1 * g;
        const float v = up(slot.moments[count + i]) * beta2 + rest2 * g * g;
        slot.moments[i] = down<T>(m);
        slot.moments[count + i] = down<T>(v);
        slot.parameter[i] = down<T>(up(slot.parameter[i]) * keep - step * m / (sqrtf(v) * correction + eps));
    }
}

// Marks the parameters whose gradient has a value whose square is not finite.
template <typename T> __device__ void not_finite(const Slot<T> *slots, const Part *parts, unsigned *found, int per_part) {
    const Part part = parts[blockIdx.x];
    const Slot<T> slot = slots[part.parameter];
    const size_t end = min((size_t)slot.count, (size_t)part.start + per_part);
    for (size_t i = part.start + threadIdx.x; i < end; i += blockDim.x)
        if (!isfinite(up(slot.gradient[i]) * up(slot.gradient[i]))) found[part.parameter] = 1u;
}

// Patches of `side` x `side` pixels of images [B, 3, height, width] as rows [B kept, 3 side^2]; which ones of each image's grid
// stands in `which` [B, kept], or all of them do.
template <typename T>
__device__ void patches(const T *images, const unsigned *which, T *out, unsigned items, int height, int width, int side, int kept) {
    const unsigned at = blockIdx.x * blockDim.x + threadIdx.x;
    if (at >= items) return;
    const unsigned values = 3 * side * side, row = at / values, value = at % values;
    const unsigned image = row / kept, patch = which ? which[row] : row % kept;
    const unsigned channel = value / (side * side), y = value / side % side, x = value % side, columns = width / side;
    // Nothing is read beyond the images; what was asked for shows that it was wrong.
    if (patch >= height / side * columns) {
        out[at] = down<T>(NAN);
        return;
    }
    out[at] = images[(((size_t)image * 3 + channel) * height + patch / columns * side + y) * width + patch % columns * side + x];
}

// Rows scaled to unit length; their lengths go to `lengths` [rows].
template <typename T> __device__ void l2_normalize(const T *x, T *out, float *lengths, int rows, int width, float eps) {
    constexpr int N = Pack<T>::N;
    const size_t row = warp_row();
    if (row >= rows) return;
    float squares = 0.f;
    for (int i = threadIdx.x * N; i < width; i += 32 * N) {
        Pack<T> p = load(x + row * width + i);
        for (int j = 0; j < N; j++) squares += up(p.v[j]) * up(p.v[j]);
    }
    const float length = sqrtf(warp_sum(squares) + eps);
    if (threadIdx.x == 0) lengths[row] = length;
    for (int i = threadIdx.x * N; i < width; i += 32 * N) {
        Pack<T> p = load(x + row * width + i);
        for (int j = 0; j < N; j++) p.v[j] = down<T>(up(p.v[j]) / length);
        store(out + row * width + i, p);
    }
}

// From the result `y` and its gradient: dx = (g - y sum(y g)) / length.
template <typename T>
__device__ void l2_normalize_backward(const T *y, const float *lengths, const T *g, T *dx, int rows, int width) {
    constexpr int N = Pack<T>::N;
    const size_t row = warp_row();
    if (row >= rows) return;
    float product = 0.f;
    for (int i = threadIdx.x * N; i < width; i += 32 * N) {
        Pack<T> p = load(y + row * width + i), q = load(g + row * width + i);
        for (int j = 0; j < N; j++) product += up(p.v[j]) * up(q.v[j]);
    }
    product = warp_sum(product);
    const float factor = 1.f / lengths[row];
    for (int i = threadIdx.x * N; i < width; i += 32 * N) {
        Pack<T> p = load(y + row * width + i), q = load(g + row * width + i);
        for (int j = 0; j < N; j++) p.v[j] = down<T>((up(q.v[j]) - up(p.v[j]) * product) * factor);
        store(dx + row * width + i, p);
    }
}

// Gradient of a table [gridDim.x, width] from that of the rows picked from it: each block adds up, in order, the gradients
// `g` [count, width] whose index `at` [count] is its own. A thread has up to 8 columns.
template <typename T> __device__ void scatter_rows(const unsigned *at, const T *g, T *out, unsigned count, int width) {
    __shared__ unsigned indices[256];
    float sums[8] = {};
    for (unsigned from = 0; from < count; from += 256) {
        __syncthreads();
        if (from + threadIdx.x < count) indices[threadIdx.x] = at[from + threadIdx.x];
        __syncthreads();
        const unsigned end = min(256u, count - from);
        for (unsigned i = 0; i < end; i++) {
            if (indices[i] != blockIdx.x) continue;
            const T *row = g + (size_t)(from + i) * width;
            for (int j = 0; j < 8; j++) {
                const int column = threadIdx.x + 256 * j;
                if (column < width) sums[j] += up(row[column]);
            }
        }
    }
    for (int j = 0; j < 8; j++) {
        const int column = threadIdx.x + 256 * j;
        if (column < width) out[(size_t)blockIdx.x * width + column] = down<T>(sums[j]);
    }
}

#include "attention.cuh"

} // namespace

#define KERNELS(T, NAME)                                                                                                       \
    extern "C" __global__ void layer_norm_##NAME(const T *x, const T *w, const T *b, T *out, float *kept, int rows, int width, \
                                                 float eps) {                                                                  \
        layer_norm(x, w, b, out, kept, rows, width, eps);                                                                      \
    }                                                                                                                          \
    extern "C" __global__ void layer_norm_backward_##NAME(const T *x, const float *kept, const T *w, const T *g,               \
                                                          const T *residual, T *dx, int rows, int width) {                     \
        layer_norm_backward(x, kept, w, g, residual, dx, rows, width);                                                         \
    }                                                                                                                          \
    extern "C" __global__ void residual_##NAME(const T *x, const T *y, const T *bias, const float *factors, const T *scale,    \
                                               T *out, const T *w, const T *b, T *normed, float *kept, int rows, int width,    \
                                               int per_factor, float eps) {                                                    \
        residual(x, y, bias, factors, scale, out, w, b, normed, kept, rows, width, per_factor, eps);                           \
    }                                                                                                                          \
    extern "C" __global__ void scale_rows_##NAME(const T *x, const float *factors, T *out, int rows, int width,                \
                                                 int per_factor) {                                                             \
        scale_rows(x, factors, out, rows, width, per_factor);                                                                  \
    }                                                                                                                          \
    extern "C" __global__ void bias_gelu_##NAME(const T *y, const T *bias, T *out, unsigned packs, int width) {                \
        add_bias<T, true>(y, bias, out, packs, width);                                                                         \
    }                                                                                                                          \
    extern "C" __global__ void bias_gelu_backward_##NAME(const T *y, const T *bias, const T *g, T *dy, unsigned packs,         \
                                                         int width) {                                                          \
        bias_gelu_backward(y, bias, g, dy, packs, width);                                                                      \
    }                                                                                                                          \
    extern "C" __global__ void split_heads_##NAME(const T *packed, const T *bias, T *q, T *k, T *v, unsigned packs,            \
                                                  int tokens, int padded, int heads, int depth, float scale) {                 \
        split_heads(packed, bias, q, k, v, packs, tokens, padded, heads, depth, scale);                                        \
    }                                                                                                                          \
    extern "C" __global__ void join_heads_##NAME(const T *q, const T *k, const T *v, T *packed, unsigned packs, int tokens,    \
                                                 int padded, int heads, int depth, float scale) {                              \
        join_heads(q, k, v, packed, packs, tokens, padded, heads, depth, scale);                                               \
    }                                                                                                                          \
    extern "C" __global__ void swap_axes_##NAME(const T *x, T *out, unsigned packs, int first, int second, int depth) {        \
        swap_axes(x, out, packs, first, second, depth);                                                                        \
    }                                                                                                                          \
    extern "C" __global__ void softmax_##NAME(T *x, int rows, int width, int stride) { softmax(x, rows, width, stride); }      \
    extern "C" __global__ void softmax_backward_##NAME(const T *p, T *g, int rows, int stride) {                               \
        softmax_backward(p, g, rows, stride);                                                                                  \
    }                                                                                                                          \
    extern "C" __global__ void column_sums_##NAME(const T *g, const T *x, const float *kept, float *sums, int rows, int width, \
                                                  int per_chunk) {                                                             \
        column_sums(g, x, kept, sums, rows, width, per_chunk);                                                                 \
    }                                                                                                                          \
    extern "C" __global__ void bias_add_##NAME(const T *y, const T *bias, T *out, unsigned packs, int width) {                 \
        add_bias<T, false>(y, bias, out, packs, width);                                                                        \
    }                                                                                                                          \
    extern "C" __global__ void scatter_rows_##NAME(const unsigned *at, const T *g, T *out, unsigned count, int width) {        \
        scatter_rows(at, g, out, count, width);                                                                                \
    }                                                                                                                          \
    extern "C" __global__ void l2_normalize_##NAME(const T *x, T *out, float *lengths, int rows, int width, float eps) {       \
        l2_normalize(x, out, lengths, rows, width, eps);                                                                       \
    }                                                                                                                          \
    extern "C" __global__ void l2_normalize_backward_##NAME(const T *y, const float *lengths, const T *g, T *dx, int rows,     \
                                                            int width) {                                                       \
        l2_normalize_backward(y, lengths, g, dx, rows, width);                                                                 \
    }                                                                                                                          \
    extern "C" __global__ void patches_##NAME(const T *images, const unsigned *which, T *out, unsigned items, int height,      \
                                              int width, int side, int kept) {                                                 \
        patches(images, which, out, items, height, width, side, kept);                                                         \
    }                                                                                                                          \
    extern "C" __global__ void adamw_##NAME(const Slot<T> *slots, const Part *parts, int per_part, float beta1, float rest1,   \
                                            float beta2, float rest2, float keep, float step, float correction, float eps) {   \
        adamw(slots, parts, per_part, beta1, rest1, beta2, rest2, keep, step, correction, eps);                                \
    }                                                                                                                          \
    extern "C" __global__ void not_finite_##NAME(const Slot<T> *slots, const Part *parts, unsigned *found, int per_part) {     \
        not_finite(slots, parts, found, per_part);                                                                             \
    }                                                                                                                          \
    extern "C" __global__ void join_sums_##NAME(const float *sums, T *out, int chunks, int width) {                            \
        join_sums(sums, out, chunks, width);                                                                                   \
    }

KERNELS(float, f32)
KERNELS(__nv_bfloat16, bf16)
KERNELS(__half, f16)

#ifdef HAS_TENSOR_CORES
#define ATTENTION(T, NAME)                                                                                                     \
    extern "C" __global__ void __launch_bounds__(32 * MOST_WARPS, 2)                                                           \
        attend_##NAME(const T *packed, const T *bias, T *out, int tokens, int heads, float scale) {                            \
        attend(packed, bias, out, tokens, heads, scale);                                                                       \
    }                                                                                                                          \
    extern "C" __global__ void cls_attention_##NAME(const T *packed, const T *bias, T *out, int tokens, int heads,             \
                                                    float scale) {                                                             \
        cls_attention(packed, bias, out, tokens, heads, scale);                                                                \
    }

ATTENTION(__nv_bfloat16, bf16)
ATTENTION(__half, f16)
#endif
