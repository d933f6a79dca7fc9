// Attention of one new token over codes, with look-ups in shared memory, which Triton cannot do.
//
// A block (1024 threads; grid: chunks x heads) takes a chunk of a KV head's tokens, if it has any:
//   1. Products: copy the head's table of <q, atom>, N atoms x G rows of q, into shared memory.
//   2. Scores: a token's s look-ups give its G scores, which stay in shared memory.
//   3. Weights: 2^(score - largest score) take their place, and are summed up.
//   4. Values: zeros take the products' place. Every token adds weight x coefficient to its atoms.
//   5. That table leaves, and each row's largest score and sums: `combine` joins the chunks.
// Step 4 adds integers. Shared memory adds them by itself, and unlike a sum of floats, theirs does
// not depend on the order. Weights are divided by the chunk's sum of weight x step size, so that no
// entry passes LARGEST, the largest coefficient in steps. The integer for that is 2^30.
// What takes time is that the 32 threads of a warp ask for 32 random atoms, and those that ask the
// same bank of the memory wait for each other. So products are in half precision, and so in step 4
// PER_TOKEN = 2 threads share a token, PER_THREAD rows each: a warp asks for half as many atoms.

typedef unsigned char u8;
typedef unsigned short u16;
__device__ float to_float(u16 half) {
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(half));
  return x;
}
__device__ u16 to_half(float x) {
  u16 half;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(half) : "f"(x));
  return half;
}
__device__ float power_of_2(float x) {
  asm("ex2.approx.ftz.f32 %0, %0;" : "+f"(x));
  return x;
}
__device__ float step_size(u8 exponent) { return BITS ? power_of_2(exponent / 16.0f - 8) : 1; }
__device__ constexpr int alignment(int bytes) { return bytes % 16 ? bytes & -bytes : 16; }
// COUNT numbers, aligned so that a thread reads them in pieces of up to 16 bytes.
template <class T, int COUNT> struct __align__(alignment(sizeof(T) * COUNT)) Array { T at[COUNT]; };

// The code of a key or value. FP8: a word is an atom, a byte its coefficient in E4M3. Else a word
// is an atom and, in its low BITS bits, a level, and one byte gives the step size.
template <int S> struct CodedVector {
  Array<u16, S> words;
  Array<u8, BITS ? 1 : S> bytes;
  __device__ CodedVector(const u16* all_words, const u8* all_bytes, size_t token)
      : words(((Array<u16, S>*)all_words)[token]),
        bytes(((Array<u8, BITS ? 1 : S>*)all_bytes)[token]) {}
  __device__ int atom(int j) { return words.at[j] >> BITS; }
  // In steps, without a conversion: a level's bits are the last ones of the float 2^23 + LARGEST +
  // level, and E4M3's, moved to where a float has such bits, make one that is 2^120 too small.
  __device__ float coefficient(int j) {
    int level = words.at[j] & (2 * LARGEST - 1), e4m3 = (bytes.at[BITS ? 0 : j] << 24) >> 4;
    return BITS ? __int_as_float(level ^ (0x4b000000 | LARGEST)) - (8388608 + LARGEST)
                : __int_as_float(e4m3 & 0x87f00000) * 1.329227995784916e36f;
  }
};

// The largest, or the sum, of each of COUNT numbers x over all threads; every thread gets them.
template <bool MAX> __device__ float join(float x, float y) { return MAX ? fmaxf(x, y) : x + y; }
template <bool MAX, int COUNT> __device__ void join_threads(float* x) {
  __shared__ float of_warp[COUNT][32], of_block[COUNT];
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32, distance = 16;
  #pragma unroll
  for (int half = COUNT / 2; half; half /= 2, distance /= 2)  // two lanes: half the numbers each
    for (int i = 0; i < half; i++) {
      float mine = lane & distance ? x[i + half] : x[i];
      float other = lane & distance ? x[i] : x[i + half];
      x[i] = join<MAX>(mine, __shfl_xor_sync(~0u, other, distance));
    }
  for (; distance; distance /= 2) x[0] = join<MAX>(x[0], __shfl_xor_sync(~0u, x[0], distance));
  of_warp[lane * COUNT / 32][warp] = x[0];
  __syncthreads();
  if (warp < COUNT) {
    float y = of_warp[warp][lane];
    for (int d = 16; d; d /= 2) y = join<MAX>(y, __shfl_xor_sync(~0u, y, d));
    of_block[warp] = y;
  }
  __syncthreads();
  for (int i = 0; i < COUNT; i++) x[i] = of_block[i];
}

extern "C" __global__ void __launch_bounds__(1024) attend_codes_chunk(
    const u16* products,                                 // (heads, G, N), in half precision
    const u16* k_words, const u8* k_bytes,               // (heads, capacity, .)
    const u16* v_words, const u8* v_bytes, const long long* compressed, int capacity,
    float4* stats, u16* tables) {                        // (heads, G, CHUNKS) and the same x N
  extern __shared__ uint4 shared[];
  Array<u16, GP>* product_table = (Array<u16, GP>*)shared;               // (N,), in steps 1 and 2
  int* value_table = (int*)shared;                       // (PER_THREAD, N, PER_TOKEN), in 3 to 5
  Array<float, GP>* scores = (Array<float, GP>*)(value_table + GP * N);  // (count,), behind both
  int n = *compressed, size = max((n + CHUNKS - 1) / CHUNKS, SHORTEST), begin = blockIdx.x * size;
  int head = blockIdx.y, count = min(size, n - begin), thread = threadIdx.x;
  if (count <= 0) return;
  // 1. Products, two atoms at a time. Here as below, codes are loaded well before their use.
  size_t token = (size_t)head * capacity + begin;        // the first of the chunk
  CodedVector<S_K> next_key(k_words, k_bytes, token + min(thread, count - 1));
  for (int i = thread; i < N / 2; i += 1024) {
    Array<u16, 2 * GP> pair;
    for (int g = 0; g < G; g++) {
      unsigned x = ((unsigned*)products)[(head * G + g) * (N / 2) + i];
      pair.at[g] = x;
      pair.at[GP + g] = x >> 16;
    }
    ((Array<u16, 2 * GP>*)product_table)[i] = pair;
  }
  __syncthreads();
  // 2. Scores.
  float top[GP], sums[2 * GP] = {};                      // of weights, then of weight x step size
  for (int g = 0; g < GP; g++) top[g] = -1e30f;
  for (int t = thread; t < count; t += 1024) {
    CodedVector<S_K> key = next_key;
    next_key = CodedVector<S_K>(k_words, k_bytes, token + min(t + 1024, count - 1));
    float step = step_size(k_bytes[token + t]);
    Array<float, GP> score = {};
    for (int j = 0; j < S_K; j++) {
      Array<u16, GP> x = product_table[key.atom(j)];
      for (int g = 0; g < G; g++) score.at[g] += key.coefficient(j) * to_float(x.at[g]);
    }
    for (int g = 0; g < G; g++) top[g] = fmaxf(top[g], score.at[g] *= step);
    scores[t] = score;
  }
  int side = thread % PER_TOKEN, first = thread / PER_TOKEN, stride = 1024 / PER_TOKEN;
  CodedVector<S_V> next_value(v_words, v_bytes, token + min(first, count - 1));
  join_threads<true, GP>(top);
  // 3. Weights, each times the step size of its token's value.
  for (int i = thread; i < N * GP / 4; i += 1024) shared[i] = make_uint4(0, 0, 0, 0);
  for (int t = thread; t < count; t += 1024) {
    float step = step_size(v_bytes[token + t]);
    Array<float, GP> x = scores[t];
    for (int g = 0; g < G; g++) {
      float weight = power_of_2(x.at[g] - top[g]);
      sums[g] += weight;
      sums[GP + g] += x.at[g] = weight * step;
    }
    scores[t] = x;
  }
  join_threads<false, 2 * GP>(sums);
  // 4. Values. This thread adds for the rows from side * PER_THREAD on.
  float units[PER_THREAD] = {};
  for (int g = 0; g < G; g++)
    if (g / PER_THREAD == side) units[g % PER_THREAD] = (1 << 30) / (LARGEST * sums[GP + g]);
  for (int t = first; t < count; t += stride) {
    CodedVector<S_V> value = next_value;
    next_value = CodedVector<S_V>(v_words, v_bytes, token + min(t + stride, count - 1));
    Array<float, PER_THREAD> weight = ((Array<float, PER_THREAD>*)scores)[t * PER_TOKEN + side];
    for (int k = 0; k < PER_THREAD; k++) weight.at[k] *= units[k];
    for (int j = 0; j < S_V; j++)
      for (int k = 0; k < PER_THREAD; k++)
        if (side * PER_THREAD + k < G)
          atomicAdd(&value_table[(k * N + value.atom(j)) * PER_TOKEN + side],
                    __float2int_rn(weight.at[k] * value.coefficient(j)));
  }
  __syncthreads();
  // 5. The table leaves two atoms at a time, in half precision, with 2^15 for 2^30.
  size_t out = (size_t)head * G * CHUNKS + blockIdx.x;   // where row 0 of the head has this chunk's
  for (int k = 0; k < PER_THREAD; k++)
    for (int i = thread; i < N / 2; i += 1024) {
      Array<int, 2 * PER_TOKEN> pair = ((Array<int, 2 * PER_TOKEN>*)value_table)[k * (N / 2) + i];
      for (int g = k, l = 0; g < G; g += PER_THREAD, l++)
        ((unsigned*)tables)[(out + g * CHUNKS) * (N / 2) + i] =
            to_half(pair.at[l] / 32768.0f) | (to_half(pair.at[PER_TOKEN + l] / 32768.0f) << 16);
    }
  for (int g = 0; g < G; g++)
    if (thread == 0) stats[out + g * CHUNKS] = make_float4(top[g], sums[g], sums[GP + g], 0);
}
