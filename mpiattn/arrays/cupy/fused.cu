// The passes over memory of the kernels on GPUs, each fused into one kernel. Half-precision types are read and
// written in place; sums are kept in A, which is float or double, and each lse in double.
//
// A row is the head_dim numbers of one token of one head. Arrays of rows, (batch, heads, tokens, dim), and of
// one number a row, (batch, heads, tokens), come with the strides of their first three axes, in elements.

#include <cuda_bf16.h>
#include <cuda_fp16.h>

typedef long long Index;

template <typename A, typename T> __device__ inline A wide(T x) { return (A)x; }
template <> __device__ inline float wide<float, __half>(__half x) { return __half2float(x); }
template <> __device__ inline float wide<float, __nv_bfloat16>(__nv_bfloat16 x) { return __bfloat162float(x); }
template <typename T, typename A> __device__ inline T narrow(A x) { return (T)x; }
template <> __device__ inline __half narrow<__half, float>(float x) { return __float2half_rn(x); }
template <> __device__ inline __nv_bfloat16 narrow<__nv_bfloat16, float>(float x) { return __float2bfloat16_rn(x); }

__device__ inline float power2(float x) { return exp2f(x); }
__device__ inline double power2(double x) { return exp2(x); }
__device__ inline float natural_log(float x) { return logf(x); }
__device__ inline double natural_log(double x) { return log(x); }

template <typename A> struct Number;
template <> struct Number<float> { static __device__ float infinity() { return __int_as_float(0x7f800000); } };
template <> struct Number<double> {
    static __device__ double infinity() { return __longlong_as_double(0x7ff0000000000000LL); }
};

const double LOG2E = 1.4426950408889634;

template <typename T, int V> struct __align__(sizeof(T) * V) Pack { T x[V]; };

struct Strides { Index b, h, t; };

// Parameters: whole numbers are Index and fractions double, as Python has them.
#define STRIDES(name) Index name##_b, Index name##_h, Index name##_t
#define AT(name) r.at({name##_b, name##_h, name##_t})

struct Row {
    Index b, h, t;
    // In 32 bits, as there are no 2**32 rows, and a division in 64 bits takes as long as the rest of a pass.
    __device__ Row(unsigned row, unsigned heads, unsigned tokens) : t(row % tokens), h(row / tokens % heads), b(row / tokens / heads) {}
    __device__ Index at(Strides s) const { return b * s.b + h * s.h + t * s.t; }
};

// One warp a row; a lane has V consecutive numbers at a time.
#define FOR_EACH_ROW \
    const int lane = threadIdx.x % 32; \
    const Index row = ((Index)blockIdx.x * blockDim.x + threadIdx.x) / 32; \
    if (row >= rows) return; \
    const Row r(row, heads, tokens);

template <typename A> __device__ A sum_of_warp(A x)
{
    for (int step = 16; step; step /= 2) x += __shfl_xor_sync(0xffffffff, x, step);
    return x;
}

// softmax.merge: (out, lse) and a partial result of the same queries, in place.
template <typename A, typename T, int V>
__global__ void merge(A* out, STRIDES(so), double* lse, STRIDES(sl), const T* part, STRIDES(sp), const double* part_lse,
                      STRIDES(sq), Index rows, Index heads, Index tokens, Index dim)
{
    FOR_EACH_ROW
    double* total = lse + AT(sl);
    const double before = *total, here = part_lse[AT(sq)], none = -Number<double>::infinity();
    __syncwarp();
    if (here == none) return;
    const bool first = before == none;
    const A odds = first ? (A)0 : power2((A)((before - here) * LOG2E));  // old weight over new; may be infinite
    const A keep = 1 / (1 + 1 / odds), add = 1 / (1 + odds);
    if (lane == 0) {
        const double high = before > here ? before : here, low = before > here ? here : before;
        *total = first ? here : high + log1p(exp(low - high));
    }
    A* to = out + AT(so);
    const T* from = part + AT(sp);
    for (Index d = lane * V; d < dim; d += 32 * V) {
        const Pack<T, V> x = *(const Pack<T, V>*)(from + d);
        Pack<A, V> y;
        if (first) {
            for (int i = 0; i < V; ++i) y.x[i] = wide<A>(x.x[i]);
        } else {
            y = *(const Pack<A, V>*)(to + d);
            for (int i = 0; i < V; ++i) y.x[i] = keep * y.x[i] + add * wide<A>(x.x[i]);
        }
        *(Pack<A, V>*)(to + d) = y;
    }
}

// What is added up: a sum so far, another that arrived, and up to four shares, each of tokens first .. first + count - 1;
// pointers are 0 where there is none. None of these arrays has gaps. A thread has V numbers of a row at a time, and
// reads all of them before it uses any. Threads are numbered within the row, then by rows.
#define PART(n) const T* part##n, Index first##n, Index count##n
#define PARTS PART(0), PART(1), PART(2), PART(3)
#define FOR_EACH_PACK \
    const T* parts[] = {part0, part1, part2, part3}; \
    const Index firsts[] = {first0, first1, first2, first3}, counts[] = {count0, count1, count2, count3}; \
    for (Index row = (Index)blockIdx.x * blockDim.y + threadIdx.y; row < rows; row += (Index)gridDim.x * blockDim.y)
#define ROWS_OF_PARTS \
    const Row r(row, heads, tokens); \
    const Index d = threadIdx.x * V, at = row * dim + d; \
    Index places[4]; /* of the row in each share; -1 where it has none */ \
    Pack<T, V> part[4]; \
    Pack<A, V> y = {}; \
    Pack<S, V> other = {}; \
    _Pragma("unroll") for (int i = 0; i < 4; ++i) { \
        const Index t = r.t - firsts[i]; \
        places[i] = t >= 0 && t < counts[i] ? (r.b * heads + r.h) * counts[i] + t : -1; \
        part[i] = places[i] >= 0 ? *(const Pack<T, V>*)(parts[i] + places[i] * dim + d) : Pack<T, V>{}; \
    } \
    if (sum) y = *(const Pack<A, V>*)(sum + at); \
    if (arrived) other = *(const Pack<S, V>*)(arrived + at);
#define WRITE_RESULT \
    Pack<R, V> z; \
    for (int j = 0; j < V; ++j) z.x[j] = narrow<R>(y.x[j]); \
    *(Pack<R, V>*)(result + at) = z;

// result = sum + arrived + shares.
template <typename A, typename T, int V, typename S, typename R>
__global__ void sum_parts(R* result, const A* sum, const S* arrived, Index rows, Index heads, Index tokens, Index dim, PARTS)
{
    FOR_EACH_PACK {
        ROWS_OF_PARTS
        for (int j = 0; j < V; ++j) {
            y.x[j] += wide<A>(other.x[j]);
            for (int i = 0; i < 4; ++i) y.x[j] += wide<A>(part[i].x[j]);
        }
        WRITE_RESULT
    }
}

// softmax.merge of all that there is. The result may be the sum, its lse may not. The lse of shares are cuDNN's floats.
template <typename A, typename T, int V, typename S, typename R>
__global__ void merge_parts(R* result, const A* sum, const S* arrived, double* lse, const double* lse_of_sum,
                            const double* lse_arrived, Index rows, Index heads, Index tokens, Index dim, PARTS,
                            const float* lse0, const float* lse1, const float* lse2, const float* lse3)
{
    const float* lses[] = {lse0, lse1, lse2, lse3};
    const double none = -Number<double>::infinity();
    FOR_EACH_PACK {
        ROWS_OF_PARTS
        double tops[6] = {sum ? lse_of_sum[row] : none, arrived ? lse_arrived[row] : none}, top = none;
        A weights[6], total = 0;
        #pragma unroll
        for (int i = 0; i < 4; ++i) tops[2 + i] = places[i] >= 0 ? (double)lses[i][places[i]] : none;
        #pragma unroll
        for (int i = 0; i < 6; ++i) top = !(tops[i] <= top) ? tops[i] : top; // not a number: stays so
        #pragma unroll
        for (int i = 0; i < 6; ++i) {
            weights[i] = top == none ? (A)0 : power2((A)((tops[i] - top) * LOG2E));
            total += weights[i];
        }
        const A factor = total == 0 ? (A)0 : 1 / total;
        for (int j = 0; j < V; ++j) {
            y.x[j] = weights[0] * y.x[j] + weights[1] * wide<A>(other.x[j]);
            for (int i = 0; i < 4; ++i) y.x[j] += weights[2 + i] * wide<A>(part[i].x[j]);
            y.x[j] *= factor;
        }
        WRITE_RESULT
        if (threadIdx.x == 0) lse[row] = top == none ? none : top + natural_log(total);
    }
}

// sum += part.
template <typename A, typename T, int V>
__global__ void accumulate(A* sum, STRIDES(ss), const T* part, STRIDES(sp), Index rows, Index heads, Index tokens, Index dim)
{
    FOR_EACH_ROW
    A* to = sum + AT(ss);
    const T* from = part + AT(sp);
    for (Index d = lane * V; d < dim; d += 32 * V) {
        const Pack<T, V> x = *(const Pack<T, V>*)(from + d);
        Pack<A, V> y = *(const Pack<A, V>*)(to + d);
        for (int i = 0; i < V; ++i) y.x[i] += wide<A>(x.x[i]);
        *(Pack<A, V>*)(to + d) = y;
    }
}

// Copy rows.
template <typename A, typename T, int V>
__global__ void copy(T* result, STRIDES(sr), const T* rows_in, STRIDES(ss), Index rows, Index heads, Index tokens, Index dim)
{
    FOR_EACH_ROW
    const T* from = rows_in + AT(ss);
    T* to = result + AT(sr);
    for (Index d = lane * V; d < dim; d += 32 * V) *(Pack<T, V>*)(to + d) = *(const Pack<T, V>*)(from + d);
}

// Round a sum.
template <typename A, typename T, int V>
__global__ void cast(T* result, STRIDES(sr), const A* sum, STRIDES(ss), Index rows, Index heads, Index tokens, Index dim)
{
    FOR_EACH_ROW
    const A* from = sum + AT(ss);
    T* to = result + AT(sr);
    for (Index d = lane * V; d < dim; d += 32 * V) {
        const Pack<A, V> x = *(const Pack<A, V>*)(from + d);
        Pack<T, V> y;
        for (int i = 0; i < V; ++i) y.x[i] = narrow<T>(x.x[i]);
        *(Pack<T, V>*)(to + d) = y;
    }
}

// softmax.delta: the sum of each row of d_out * out.
template <typename A, typename T, int V>
__global__ void delta(A* result, STRIDES(sr), const T* d_out, STRIDES(sd), const T* out, STRIDES(so), Index rows, Index heads,
                      Index tokens, Index dim)
{
    FOR_EACH_ROW
    const T *a = d_out + AT(sd), *b = out + AT(so);
    A sum = 0;
    for (Index d = lane * V; d < dim; d += 32 * V) {
        const Pack<T, V> x = *(const Pack<T, V>*)(a + d), y = *(const Pack<T, V>*)(b + d);
        for (int i = 0; i < V; ++i) sum += wide<A>(x.x[i]) * wide<A>(y.x[i]);
    }
    sum = sum_of_warp(sum);
    if (lane == 0) result[AT(sr)] = sum;
}

// The shortest rows whose product with d_out has the given sums: delta * d_out / |d_out|^2. And lse as cuDNN takes it.
template <typename A, typename T, int V>
__global__ void stand_in(T* out, STRIDES(so), float* near_lse, STRIDES(sn), const T* d_out, STRIDES(sd), const double* lse,
                         STRIDES(sl), const A* delta, STRIDES(se), Index rows, Index heads, Index tokens, Index dim)
{
    FOR_EACH_ROW
    const T* from = d_out + AT(sd);
    T* to = out + AT(so);
    A sum = 0;
    for (Index d = lane * V; d < dim; d += 32 * V) {
        const Pack<T, V> x = *(const Pack<T, V>*)(from + d);
        for (int i = 0; i < V; ++i) sum += wide<A>(x.x[i]) * wide<A>(x.x[i]);
    }
    sum = sum_of_warp(sum);
    const A factor = sum > 0 ? delta[AT(se)] / sum : (A)0;
    if (lane == 0) near_lse[AT(sn)] = (float)lse[AT(sl)];
    for (Index d = lane * V; d < dim; d += 32 * V) {
        const Pack<T, V> x = *(const Pack<T, V>*)(from + d);
        Pack<T, V> y;
        for (int i = 0; i < V; ++i) y.x[i] = narrow<T>(factor * wide<A>(x.x[i]));
        *(Pack<T, V>*)(to + d) = y;
    }
}

// The norm of each row.
template <typename A, typename T, int V>
__global__ void norm(double* result, STRIDES(sr), const T* rows_in, STRIDES(ss), Index rows, Index heads, Index tokens,
                     Index dim)
{
    FOR_EACH_ROW
    const T* from = rows_in + AT(ss);
    double sum = 0;
    for (Index d = lane * V; d < dim; d += 32 * V) {
        const Pack<T, V> x = *(const Pack<T, V>*)(from + d);
        for (int i = 0; i < V; ++i) sum += (double)wide<A>(x.x[i]) * (double)wide<A>(x.x[i]);
    }
    sum = sum_of_warp(sum);
    if (lane == 0) result[AT(sr)] = sqrt(sum);
}

// Scores of one query as the product of matrices has them, to be scaled to log2.
template <typename A> struct TileScores {
    typedef A S;
    const A* score;
    A scale, cap;
    __device__ TileScores(const A* score, double scale, double cap)
        : score(score), scale(cap ? scale / cap : scale * LOG2E), cap(cap * LOG2E) {}
    __device__ S inner(Index key) const { return cap ? tanh(score[key] * scale) : score[key] * scale; }
    __device__ S outer(S inner) const { return cap ? cap * inner : inner; }
    __device__ static A weight(S difference) { return power2(difference); }
    __device__ static double natural(S logit) { return logit / LOG2E; }
    __device__ static S shift(double lse) { return lse * LOG2E; }
};

// Scores so large that A does not know them well: natural, and computed anew, always in the same order. So they are the
// same bits forward and backward, and their difference from the lse is right however large both are.
template <typename A, typename T> struct LargeScores {
    typedef double S;
    const T *q, *k;
    Index step, dim;
    double scale, cap;
    __device__ S inner(Index key) const
    {
        double sum = 0;
        for (Index d = 0; d < dim; ++d) sum = fma((double)wide<A>(q[d]), (double)wide<A>(k[key * step + d]), sum);
        return cap ? tanh(sum * scale / cap) : sum * scale;
    }
    __device__ S outer(S inner) const { return cap ? cap * inner : inner; }
    __device__ static A weight(S difference) { return power2((A)(difference * LOG2E)); }
    __device__ static double natural(S logit) { return logit; }
    __device__ static S shift(double lse) { return lse; }
};

// From which bound on, natural, scores are large: here A knows them to 1e-5 (float), to 1e-8 (double).
template <typename A> __device__ double large();
template <> __device__ double large<float>() { return 256; }
template <> __device__ double large<double>() { return 16777216; }

// The rows of queries and keys of a tile, as the product of matrices has them: steps from head to head and from row to
// row; how many rows a head has; and the norms of queries, and of the longest key of each head.
#define FACTORS const T* q, Index q_head, Index q_row, const T* k, Index k_head, Index k_row, Index q_rows, Index dim, \
                const double* q_norm, const double* k_norm

// What is done with the `scores` of a row, whichever they are; all threads of a block have the same row. The two passes
// have launch bounds, as large scores take more registers, and with them others would take half as long again.
#define WITH_SCORES(...) \
    const Index head = (unsigned)row / (unsigned)q_rows; /* see Row */ \
    if (q_norm[row] * k_norm[head] * fabs(natural_scale) <= large<A>()) { \
        const TileScores<A> scores(score + row * keys, natural_scale, natural_cap); \
        __VA_ARGS__ \
    } else { \
        const T *near_q = q + head * q_head + (row - head * q_rows) * q_row, *near_k = k + head * k_head; \
        const LargeScores<A, T> scores{near_q, near_k, k_row, dim, natural_scale, natural_cap}; \
        __VA_ARGS__ \
    }

template <typename S, typename A> struct Softmax { S top; A sum; };

template <typename Scores, typename S, typename A> __device__ Softmax<S, A> joined(Softmax<S, A> a, Softmax<S, A> b)
{
    const S top = a.top > b.top ? a.top : b.top;
    if (top == -Number<S>::infinity()) return {top, (A)0};
    return {top, a.sum * Scores::weight(a.top - top) + b.sum * Scores::weight(b.top - top)};
}

// The largest score of keys first .. last - 1, and the sum of their weights.
template <typename A, typename Scores>
__device__ Softmax<typename Scores::S, A> softmax_of(const Scores& scores, Index first, Index last)
{
    typedef typename Scores::S S;
    Softmax<S, A> state = {-Number<S>::infinity(), (A)0};
    for (Index key = first + threadIdx.x; key < last; key += blockDim.x)
        state = joined<Scores>(state, Softmax<S, A>{scores.outer(scores.inner(key)), (A)1});
    for (int step = 16; step; step /= 2) {
        const S top = __shfl_xor_sync(0xffffffff, state.top, step);
        const A sum = __shfl_xor_sync(0xffffffff, state.sum, step);
        state = joined<Scores>(state, Softmax<S, A>{top, sum});
    }
    __shared__ Softmax<S, A> warps[32];
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = state;
    __syncthreads();
    state = warps[0];
    for (int warp = 1; warp < blockDim.x / 32; ++warp) state = joined<Scores>(state, warps[warp]);
    return state;
}

// Which weights dropout keeps: see dropout.py. `least` is the least number of those kept; 0 where there is no dropout.
#define DROPOUT Index least, Index seed, Index batch, Index first_head, double kept_factor, const Index* q_positions, \
                const Index* k_positions

__device__ unsigned philox(Index key_position, Index query_position, Index head, Index batch, unsigned long long seed)
{
    unsigned a = key_position / 4, b = query_position, c = head, d = batch, left = seed, right = seed >> 32;
    for (int round = 0; round < 10; ++round) {
        const unsigned long long first = 0xD2511F53ULL * a, second = 0xCD9E8D57ULL * c;
        a = (unsigned)(second >> 32) ^ b ^ left;
        b = (unsigned)second;
        c = (unsigned)(first >> 32) ^ d ^ right;
        d = (unsigned)first;
        left += 0x9E3779B9;
        right += 0xBB67AE85;
    }
    const int word = key_position % 4;
    return word == 0 ? a : word == 1 ? b : word == 2 ? c : d;
}

#define KEPT(key) (!least || philox(k_positions[key], q_positions[query], first_head + row / queries, batch, seed) >= least)

// The weights of the softmax of each row of a tile of scores, and its lse; one block a row. Row i of the tile is
// query i % queries; it sees the tile's keys start - offset .. stop - offset. Scores and weights may be one array.
// With a softcap, which is 0 where there is none, scores are softcap * tanh(scale * score / softcap).
template <typename A, typename T>
__global__ void __launch_bounds__(256, 8)
softmax(const A* score, T* weight, double* lse, const int* start, const int* stop, Index offset, Index queries, Index keys,
        double natural_scale, double natural_cap, FACTORS, DROPOUT)
{
    const Index row = blockIdx.x, query = row % queries;
    const Index first = max(start[query] - offset, (Index)0), last = min(stop[query] - offset, keys);
    WITH_SCORES(
        const auto state = softmax_of<A>(scores, first, last);
        const A factor = state.sum > 0 ? (A)kept_factor / state.sum : (A)0;
        for (Index key = threadIdx.x; key < keys; key += blockDim.x) {
            const bool used = key >= first && key < last && KEPT(key);
            weight[row * keys + key] =
                narrow<T>(used ? scores.weight(scores.outer(scores.inner(key)) - state.top) * factor : (A)0);
        }
        if (threadIdx.x == 0) lse[row] = log((double)state.sum) + scores.natural(state.top);
    )
}

// Weights from scores and the final lse, and the gradient of the scaled scores from that of the weights. Scores and
// weights, and the two gradients, may be one array. A weight never exceeds 1, however lse was rounded.
template <typename A, typename T>
__global__ void __launch_bounds__(256, 8)
softmax_backward(const A* score, const A* d_weight, T* weight, T* d_score, const double* lse, const A* delta,
                 const int* start, const int* stop, Index offset, Index queries, Index keys, double natural_scale,
                 double natural_cap, FACTORS, DROPOUT)
{
    const Index row = blockIdx.x, query = row % queries;
    const bool some = lse[row] != -Number<double>::infinity();
    const Index first = max(start[query] - offset, (Index)0), last = some ? min(stop[query] - offset, keys) : 0;
    const A mean = delta[row];
    WITH_SCORES(
        const auto shift = scores.shift(lse[row]);
        for (Index key = threadIdx.x; key < keys; key += blockDim.x) {
            const Index at = row * keys + key;
            A w = 0, d = 0;
            if (key >= first && key < last) {
                const auto inner = scores.inner(key), difference = scores.outer(inner) - shift;
                const A whole = scores.weight(difference > 0 ? 0 : difference), kept = KEPT(key) ? (A)kept_factor : (A)0;
                w = whole * kept;
                d = whole * (d_weight[at] * kept - mean) * (A)(natural_cap ? 1 - inner * inner : 1);
            }
            weight[at] = narrow<T>(w);
            d_score[at] = narrow<T>(d);
        }
    )
}
