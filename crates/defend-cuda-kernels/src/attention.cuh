// Attention of heads of 64 channels without a backward pass, for bf16 and f16: logits and probabilities never leave the
// processor. Products are the tensor cores' 16 x 8 x 16, which compute capability 8.0 is needed for.
//
// Softmax goes through the keys in tiles: sums and results of the tiles before are scaled down when a higher logit comes.
// Biases of the keys move all logits of a query alike, so they are left out; those of the values are added at the end, as
// probabilities sum to one.

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
#define HAS_TENSOR_CORES

// Channels of a head, and keys of a tile.
constexpr int DEPTH = 64, KEYS = 64;
// Queries of a warp.
constexpr int QUERIES = 16;
// Warps of a block at most: what the registers suffice for.
constexpr int MOST_WARPS = 7;
// Values of 16 bytes, and such packs of a row.
constexpr int PACK = 8, PACKS = DEPTH / PACK;

// Where a pack of a tile's row lies in shared memory: eight rows' packs of one column are in different banks.
__device__ __forceinline__ int place(int row, int pack) { return row * DEPTH + ((pack ^ row) & 7) * PACK; }

// 16 bytes to shared memory, in the background; zeros where there is nothing.
template <typename T> __device__ __forceinline__ void fetch(T *to, const T *from, bool there) {
    const unsigned address = (unsigned)__cvta_generic_to_shared(to);
    const int bytes = there ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(address), "l"(from), "r"(bytes));
}

// Four matrices of 8 x 8 values; a lane gives the address of a row.
__device__ __forceinline__ void load_matrices(unsigned (&v)[4], const void *row) {
    const unsigned address = (unsigned)__cvta_generic_to_shared(row);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
                 : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
                 : "r"(address));
}

__device__ __forceinline__ void load_transposed(unsigned (&v)[4], const void *row) {
    const unsigned address = (unsigned)__cvta_generic_to_shared(row);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
                 : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
                 : "r"(address));
}

// sums += a b for a of 16 x 16 and b of 16 x 8.
template <typename T> __device__ __forceinline__ void multiply(float (&sums)[4], const unsigned (&a)[4], unsigned b0, unsigned b1);
template <>
__device__ __forceinline__ void multiply<__nv_bfloat16>(float (&sums)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"
                 : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
__device__ __forceinline__ void multiply<__half>(float (&sums)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"
                 : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Two values side by side, the first in the low half.
template <typename T> __device__ __forceinline__ unsigned pair(float low, float high) {
    union {
        T v[2];
        unsigned bits;
    } both;
    both.v[0] = down<T>(low);
    both.v[1] = down<T>(high);
    return both.bits;
}

// Sums and maxima over the four lanes that share a row of a product.
__device__ __forceinline__ float row_max(float v) {
    v = fmaxf(v, __shfl_xor_sync(0xffffffffu, v, 1));
    return fmaxf(v, __shfl_xor_sync(0xffffffffu, v, 2));
}
__device__ __forceinline__ float row_sum(float v) {
    v += __shfl_xor_sync(0xffffffffu, v, 1);
    return v + __shfl_xor_sync(0xffffffffu, v, 2);
}

// Keys and values of a tile; rows beyond the tokens are zeros.
template <typename T>
__device__ __forceinline__ void fetch_tile(T *keys, T *values, const T *image, int first, int tokens, int width) {
    const int threads = 32 * blockDim.y, thread = threadIdx.y * 32 + threadIdx.x;
    for (int i = thread; i < KEYS * PACKS; i += threads) {
        const int row = i / PACKS, pack = i % PACKS, token = first + row;
        // An address within the image also where nothing is read.
        const T *from = image + (size_t)min(token, tokens - 1) * 3 * width + pack * PACK;
        fetch(keys + place(row, pack), from + width, token < tokens);
        fetch(values + place(row, pack), from + 2 * width, token < tokens);
    }
    asm volatile("cp.async.commit_group;\n");
}

// Attention of `packed` [B, T, 3, h, 64] before its bias into `out` [B, T, h, 64]. A block has the queries of one head of one image,
// 16 for each of its warps.
template <typename T>
__device__ void attend(const T *packed, const T *bias, T *out, int tokens, int heads, float scale) {
    __shared__ alignas(16) T tiles[2][2][KEYS * DEPTH];
    const int width = heads * DEPTH, head = blockIdx.x % heads;
    const size_t image = blockIdx.x / heads;
    packed += image * tokens * 3 * width + head * DEPTH;
    bias += head * DEPTH;
    const int lane = threadIdx.x, rest = lane % 4 * 2;
    const int query = (blockIdx.y * blockDim.y + threadIdx.y) * QUERIES + lane / 4;
    // Exponentials are powers of two.
    constexpr float LOG2E = 1.4426950408889634f;

    fetch_tile(tiles[0][0], tiles[0][1], packed, 0, tokens, width);
    // Rows `query` and `query + 8`; those beyond the tokens repeat the last one and are not written.
    unsigned q[DEPTH / 16][4];
#pragma unroll
    for (int i = 0; i < DEPTH / 16; i++)
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const int row = min(query + j % 2 * 8, tokens - 1), column = i * 16 + j / 2 * 8 + rest;
            const T *from = packed + (size_t)row * 3 * width + column;
            q[i][j] = pair<T>((up(from[0]) + up(bias[column])) * scale, (up(from[1]) + up(bias[column + 1])) * scale);
        }
    float results[DEPTH / 8][4] = {}, top[2] = {-INFINITY, -INFINITY}, sum[2] = {};
    const int count = (tokens + KEYS - 1) / KEYS;
    for (int tile = 0; tile < count; tile++) {
        const T *keys = tiles[tile % 2][0], *values = tiles[tile % 2][1];
        const int first = tile * KEYS;
        if (tile + 1 < count) {
            fetch_tile(tiles[(tile + 1) % 2][0], tiles[(tile + 1) % 2][1], packed, first + KEYS, tokens, width);
            asm volatile("cp.async.wait_group 1;\n");
        } else {
            asm volatile("cp.async.wait_group 0;\n");
        }
        __syncthreads();
        // Sixteen keys at a time; of the last tile only those that hold some.
        const int sixteens = min(KEYS, tokens - first + 15) / 16;
        float logits[KEYS / 8][4];
#pragma unroll
        for (int n = 0; n < KEYS / 16; n++) {
#pragma unroll
            for (int j = 0; j < 4; j++) logits[2 * n][j] = logits[2 * n + 1][j] = n < sixteens ? 0.f : -INFINITY;
            if (n >= sixteens) continue;
#pragma unroll
            for (int i = 0; i < DEPTH / 16; i++) {
                unsigned k[4];
                load_matrices(k, keys + place(n * 16 + lane / 16 * 8 + lane % 8, 2 * i + lane / 8 % 2));
                multiply<T>(logits[2 * n], q[i], k[0], k[1]);
                multiply<T>(logits[2 * n + 1], q[i], k[2], k[3]);
            }
        }
        if (first + KEYS > tokens)
#pragma unroll
            for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
                for (int j = 0; j < 4; j++)
                    if (first + n * 8 + rest + j % 2 >= tokens) logits[n][j] = -INFINITY;
        // A tile has a key at least, so its maximum is a number.
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float highest = top[half];
#pragma unroll
            for (int n = 0; n < KEYS / 8; n++) highest = fmaxf(highest, fmaxf(logits[n][2 * half], logits[n][2 * half + 1]));
            highest = row_max(highest);
            const float before = exp2f((top[half] - highest) * LOG2E), shift = highest * LOG2E;
            top[half] = highest;
            float added = 0.f;
#pragma unroll
            for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
                for (int j = 2 * half; j < 2 * half + 2; j++) {
                    logits[n][j] = exp2f(logits[n][j] * LOG2E - shift);
                    added += logits[n][j];
                }
            sum[half] = sum[half] * before + added;
#pragma unroll
            for (int n = 0; n < DEPTH / 8; n++) {
                results[n][2 * half] *= before;
                results[n][2 * half + 1] *= before;
            }
        }
#pragma unroll
        for (int k = 0; k < KEYS / 16; k++) {
            if (k >= sixteens) continue;
            const float(&even)[4] = logits[2 * k], (&odd)[4] = logits[2 * k + 1];
            const unsigned p[4] = {pair<T>(even[0], even[1]), pair<T>(even[2], even[3]), pair<T>(odd[0], odd[1]),
                                   pair<T>(odd[2], odd[3])};
#pragma unroll
            for (int n = 0; n < DEPTH / 16; n++) {
                unsigned v[4];
                load_transposed(v, values + place(k * 16 + lane % 16, 2 * n + lane / 16));
                multiply<T>(results[2 * n], p, v[0], v[1]);
                multiply<T>(results[2 * n + 1], p, v[2], v[3]);
            }
        }
        // The tile after the next takes this one's place.
        __syncthreads();
    }
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const float factor = 1.f / row_sum(sum[half]);
        const int row = query + 8 * half;
        if (row >= tokens) continue;
        T *to = out + (image * tokens + row) * width + head * DEPTH;
        const T *shift = bias + 2 * width;
#pragma unroll
        for (int n = 0; n < DEPTH / 8; n++) {
            const int column = n * 8 + rest;
            const float low = results[n][2 * half] * factor + up(shift[column]);
            const float high = results[n][2 * half + 1] * factor + up(shift[column + 1]);
            *reinterpret_cast<unsigned *>(to + column) = pair<T>(low, high);
        }
    }
}

// The first token's attention to the others, [B, h, T - 1], of the same `packed`; a block has one head of one image.
template <typename T>
__device__ void cls_attention(const T *packed, const T *bias, T *out, int tokens, int heads, float scale) {
    __shared__ float query[DEPTH], tops[WARPS], sums[WARPS];
    const int width = heads * DEPTH, head = blockIdx.x % heads, thread = threadIdx.y * 32 + threadIdx.x;
    packed += (size_t)(blockIdx.x / heads) * tokens * 3 * width + head * DEPTH;
    if (thread < DEPTH) query[thread] = up(down<T>((up(packed[thread]) + up(bias[head * DEPTH + thread])) * scale));
    __syncthreads();
    const auto logit = [&](int token) {
        const T *key = packed + (size_t)token * 3 * width + width;
        float sum = 0.f;
        for (int i = 0; i < PACKS; i++) {
            Pack<T> p = load(key + i * PACK);
            for (int j = 0; j < PACK; j++) sum += query[i * PACK + j] * up(p.v[j]);
        }
        return sum;
    };
    float top = -INFINITY, sum = 0.f;
    for (int token = thread; token < tokens; token += 32 * WARPS) top = fmaxf(top, logit(token));
    top = warp_max(top);
    if (threadIdx.x == 0) tops[threadIdx.y] = top;
    __syncthreads();
    for (int i = 0; i < WARPS; i++) top = fmaxf(top, tops[i]);
    for (int token = thread; token < tokens; token += 32 * WARPS) sum += expf(logit(token) - top);
    sum = warp_sum(sum);
    if (threadIdx.x == 0) sums[threadIdx.y] = sum;
    __syncthreads();
    sum = 0.f;
    for (int i = 0; i < WARPS; i++) sum += sums[i];
    out += (size_t)blockIdx.x * (tokens - 1);
    for (int token = thread; token < tokens; token += 32 * WARPS)
        if (token > 0) out[token - 1] = down<T>(expf(logit(token) - top) / sum);
}

#endif
