// Attention of one new token over codes, with look-ups in shared memory, which Triton cannot do.
//
// A token has a code for each KV head, or for several together; R rows of q belong to it. A block
// (1024 threads; grid: chunks x codes of a token) takes a chunk of tokens, if it has any. What
// takes time is that the 32 threads of a warp ask for 32 random atoms, and those that ask the same
// bank of the memory wait for each other. So products are in half precision, and so in step 4
// PER_TOKEN threads share a token, PER_THREAD rows each: a warp asks for fewer atoms.

typedef unsigned char u8;
typedef unsigned short u16;
constexpr int LARGEST = BITS ? 1 << (BITS - 1) : 448;  // coefficient, in steps
constexpr int PER_TOKEN = RP < 2 ? 1 : RP < 8 ? 2 : 4, PER_THREAD = RP / PER_TOKEN;  // RP: padded R
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
__device__ float step_size(u8 byte) { return BITS ? exp2f(byte / 16.0f - 8) : 1; }
__device__ constexpr int alignment(int bytes) { return bytes % 16 ? bytes & -bytes : 16; }
// COUNT numbers, aligned so that a thread reads them in pieces of up to 16 bytes.
template <class T, int COUNT> struct __align__(alignment(sizeof(T) * COUNT)) Array { T at[COUNT]; };

// The code of a key or value. FP8: a word is an atom, a byte its coefficient in E4M3. Else a word
// is an atom and, in its low BITS bits, a level, and one byte gives the step size.
template <int S> using Words = Array<u16, S>;
template <int S> using Bytes = Array<u8, BITS ? 1 : S>;
template <int S> struct Code {
  Words<S> words;
  Bytes<S> bytes;
  __device__ int atom(int j) { return words.at[j] >> BITS; }
  __device__ float step() { return step_size(bytes.at[0]); }
  // In steps, without a conversion: a level's bits are the last ones of the float 2^23 + LARGEST +
  // level, and E4M3's, moved to where a float has such bits, make one that is 2^120 too small.
  __device__ float coefficient(int j) {
    int level = words.at[j] & (2 * LARGEST - 1), e4m3 = (bytes.at[BITS ? 0 : j] << 24) >> 4;
    return BITS ? __int_as_float(level ^ (0x4b000000 | LARGEST)) - (8388608 + LARGEST)
                : __int_as_float(e4m3 & 0x87f00000) * 1.329227995784916e36f;
  }
};

extern "C" __global__ void __launch_bounds__(1024) attend_codes_chunk(
    const unsigned* products,                              // (codes, R, N), in half precision
    const Words<S_K>* k_words, const Bytes<S_K>* k_bytes,  // (codes, capacity)
    const Words<S_V>* v_words, const Bytes<S_V>* v_bytes, const long long* compressed, int capacity,
    float2* stats, unsigned* tables) {           // (codes, R, 1 + CHUNKS) and (codes, R, CHUNKS, N)
  extern __shared__ uint4 shared[];
  Array<u16, RP>* product_table = (Array<u16, RP>*)shared;           // (N,), in steps 1 and 2
  int* value_table = (int*)shared;                         // (PER_THREAD, N, PER_TOKEN), in 3 to 5
  Array<u16, RP>* scores = (Array<u16, RP>*)(value_table + RP * N);  // (tokens,), behind both
  __shared__ float reference[RP];                          // RP: R, padded to a power of two
  __shared__ int tops[RP], totals[RP], largest_byte;
  int n = *compressed, size = max((n + CHUNKS - 1) / CHUNKS, SHORTEST), begin = blockIdx.x * size;
  int code = blockIdx.y, last = min(size, n - begin) - 1, thread = threadIdx.x;
  if (last < 0) return;
  size_t first_token = (size_t)code * capacity + begin;
  k_words += first_token, k_bytes += first_token, v_words += first_token, v_bytes += first_token;
  stats += code * R * (CHUNKS + 1);                        // a row's first: the dense tokens' own
  if (thread < R) {
    reference[thread] = fmaxf(stats[thread * (CHUNKS + 1)].x, -99);
    tops[thread] = -1000000000, totals[thread] = largest_byte = 0;
  }
  // 1. Products <q, atom>, two atoms at a time. Here as below, codes are loaded well before use.
  Code<S_K> next_key = {k_words[min(thread, last)], k_bytes[min(thread, last)]};
  #pragma unroll 2
  for (int i = thread; i < N / 2; i += 1024) {
    Array<u16, 2 * RP> pair;
    for (int r = 0; r < R; r++) {
      unsigned x = products[(code * R + r) * (N / 2) + i];
      pair.at[r] = x;
      pair.at[RP + r] = x >> 16;
    }
    ((Array<u16, 2 * RP>*)product_table)[i] = pair;
  }
  __syncthreads();
  // 2. Scores: s look-ups give a token's R scores. They are kept minus the largest one of a dense
  // token (the newest always is): near it, where weights count, half precision is exact enough.
  float top[RP];
  for (int r = 0; r < RP; r++) top[r] = -1e9f;
  for (int t = thread; t <= last; t += 1024) {
    Code<S_K> key = next_key;
    next_key = {k_words[min(t + 1024, last)], k_bytes[min(t + 1024, last)]};
    float score[RP] = {};
    for (int j = 0; j < S_K; j++) {
      Array<u16, RP> x = product_table[key.atom(j)];
      for (int r = 0; r < R; r++) score[r] += key.coefficient(j) * to_float(x.at[r]);
    }
    for (int r = 0; r < R; r++) {
      score[r] = score[r] * key.step() - reference[r];
      top[r] = fmaxf(top[r], score[r]);
      scores[t].at[r] = to_half(score[r]);
    }
  }
  int side = thread % PER_TOKEN, first = thread / PER_TOKEN, stride = 1024 / PER_TOKEN;
  Code<S_V> next_value = {v_words[min(first, last)], v_bytes[min(first, last)]};
  for (int r = 0; r < R; r++) {
    int of_warp = __reduce_max_sync(~0u, __float2int_ru(top[r]));  // it need not be exact
    if (thread % 32 == 0) atomicMax(&tops[r], of_warp);
  }
  __syncthreads();
  // 3. Weights, 2^(score - top), take the scores' place, and zeros the products'. Sums of weights
  // are integers, in units of size / 2^30: whatever the order, they have the same bits.
  for (int i = thread; i < N * RP / 4; i += 1024) shared[i] = make_uint4(0, 0, 0, 0);
  float total[RP] = {}, unit = size / 1073741824.0f;
  int byte = 0;
  for (int t = thread; t <= last; t += 1024) {
    if (BITS) byte = max(byte, v_bytes[t].at[0]);
    Array<u16, RP> x = scores[t];
    for (int r = 0; r < R; r++) {
      float weight = exp2f(to_float(x.at[r]) - tops[r]);
      total[r] += weight;
      x.at[r] = to_half(weight);
    }
    scores[t] = x;
  }
  for (int r = 0; r < R; r++) {
    int of_warp = __reduce_add_sync(~0u, (int)(total[r] / unit));
    if (thread % 32 == 0) atomicAdd(&totals[r], of_warp);
  }
  byte = __reduce_max_sync(~0u, byte);
  if (thread % 32 == 0) atomicMax(&largest_byte, byte);
  __syncthreads();
  // 4. Values: a token adds weight x coefficient to its atoms, this thread for the rows from side *
  // PER_THREAD on, as integers, too: shared memory adds those by itself. No entry of the table
  // passes total weight x largest step size x LARGEST, and the integer for that is 2^30.
  float largest = LARGEST * step_size(largest_byte), to_integer[PER_THREAD];
  for (int k = 0; k < PER_THREAD; k++)
    to_integer[k] = (1 << 30) / (largest * unit * totals[side * PER_THREAD + k]);
  for (int t = first; t <= last; t += stride) {
    Code<S_V> value = next_value;
    next_value = {v_words[min(t + stride, last)], v_bytes[min(t + stride, last)]};
    float weight[PER_THREAD];
    for (int k = 0; k < PER_THREAD; k++)
      weight[k] = to_float(scores[t].at[side * PER_THREAD + k]) * value.step() * to_integer[k];
    for (int j = 0; j < S_V; j++)
      for (int k = 0; k < PER_THREAD; k++)
        if (side * PER_THREAD + k < R)
          atomicAdd(&value_table[(k * N + value.atom(j)) * PER_TOKEN + side],
                    __float2int_rn(weight[k] * value.coefficient(j)));
  }
  __syncthreads();
  // 5. The table leaves two atoms at a time, as a mean over the chunk's weights, in half precision.
  if (thread < R)
    stats[thread * (CHUNKS + 1) + 1 + blockIdx.x] =
        make_float2(tops[thread] + reference[thread], totals[thread] * unit);
  tables += ((size_t)code * R * CHUNKS + blockIdx.x) * (N / 2);
  for (int k = 0; k < PER_THREAD; k++)
    for (int i = thread; i < N / 2; i += 1024) {
      Array<int, 2 * PER_TOKEN> pair = ((Array<int, 2 * PER_TOKEN>*)value_table)[k * (N / 2) + i];
      for (int r = k, l = 0; r < R; r += PER_THREAD, l++)
        tables[r * CHUNKS * (N / 2) + i] = to_half(pair.at[l] * (largest / (1 << 30))) |
            (to_half(pair.at[PER_TOKEN + l] * (largest / (1 << 30))) << 16);
    }
}
