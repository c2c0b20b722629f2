// How fast blocks of a cluster pass alpha and Y to each other through distributed shared memory, and nothing else: no
// products, no softmax. 480p (h,w), full clip: 252 query tiles and heads x 630 key rows x 52 columns x 512 bytes.
//     nvcc -arch=sm_90a -O3 -o cluster benchmarks/cluster.cu && ./cluster
// In a step each block makes ROWS key rows and sends every other block its share of the columns. Receivers have two
// buffers; a sender waits until the receivers have given one back. BULK: one thread starts copies of `piece` bytes
// (cp.async.bulk). Otherwise 128 threads store 16 bytes at a time (st.async). KV: the key rows' K and V come from L2
// or device memory meanwhile, as they would.
#include <cstdint>
#include <cstdio>
#include <cuda_runtime.h>

constexpr int COLUMNS = 52, VECTOR = 512, STAGES = 2;
using u32 = uint32_t;
using u64 = uint64_t;

__device__ u32 address(const void* p) { return (u32)__cvta_generic_to_shared(p); }
__device__ u32 peer(u32 a, u32 block) {
  u32 r;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(block));
  return r;
}
__device__ void wait(u32 barrier, u32 parity) {
  asm volatile(
      "{ .reg .pred p; again: mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%0], %1; @!p bra again; }" ::"r"(
          barrier),
      "r"(parity)
      : "memory");
}
__device__ void expect(u32 barrier, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

template <int CLUSTER, int ROWS, bool BULK, bool KV>
__global__ void __launch_bounds__(256) exchange(const char* kv, size_t kv_bytes, int steps, int piece, float* out) {
  extern __shared__ __align__(128) char memory[];
  __shared__ __align__(8) u64 full[STAGES], ready[STAGES], loaded[STAGES];
  constexpr int SHARE = ROWS * COLUMNS * VECTOR / CLUSTER / 16 * 16;  // bytes for one receiver
  constexpr int PAIR = ROWS * COLUMNS * VECTOR;                         // K and V of the step's key rows
  char *sent = memory, *received = memory + CLUSTER * SHARE, *keys = received + STAGES * CLUSTER * SHARE;
  u32 me, thread = threadIdx.x;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(me));
  for (int i = thread; i < CLUSTER * SHARE / 4; i += blockDim.x) ((int*)sent)[i] = i;
  if (thread == 0)
    for (int s = 0; s < STAGES; s++) {
      asm volatile("mbarrier.init.shared.b64 [%0], 1;" ::"r"(address(full + s)));
      asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(address(ready + s)), "r"(CLUSTER));
      asm volatile("mbarrier.init.shared.b64 [%0], 1;" ::"r"(address(loaded + s)));
    }
  asm volatile("fence.mbarrier_init.release.cluster; fence.proxy.async;" ::: "memory");
  asm volatile("barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;" ::: "memory");

  if (thread < 128) {  // sends
    for (int t = 0; t < steps; t++) {
      int s = t % STAGES;
      if (t >= STAGES) wait(address(ready + s), (t / STAGES - 1) & 1);
      for (int n = 0; n < CLUSTER; n++) {
        u32 to = (me + n) % CLUSTER;
        u32 source = address(sent + to * SHARE), target = peer(address(received + (s * CLUSTER + me) * SHARE), to);
        u32 barrier = peer(address(full + s), to);
        if (BULK) {
          if (thread == 0)
            for (int at = 0; at < SHARE; at += piece) {
              int size = min(piece, SHARE - at);
              asm volatile(
                  "cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                      target + at),
                  "r"(source + at), "r"(size), "r"(barrier)
                  : "memory");
            }
        } else {
          for (int at = thread * 16; at < SHARE; at += 128 * 16) {
            u32 a, b, c, d;
            asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                         : "=r"(a), "=r"(b), "=r"(c), "=r"(d)
                         : "r"(source + at));
            asm volatile(
                "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(
                    target + at),
                "r"(a), "r"(b), "r"(c), "r"(d), "r"(barrier)
                : "memory");
          }
        }
      }
    }
  } else if (thread < 160) {  // receives
    float sum = 0;
    for (int t = 0; t < steps; t++) {
      int s = t % STAGES;
      if (thread == 128) expect(address(full + s), CLUSTER * SHARE);
      wait(address(full + s), (t / STAGES) & 1);
      sum += ((float*)received)[s * CLUSTER * SHARE / 4 + thread];
      __syncwarp();
      if (thread - 128 < CLUSTER)
        asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(
                         peer(address(ready + s), thread - 128))
                     : "memory");
    }
    if (sum == 12345.f) *out = sum;
  } else if (KV && thread == 160) {  // loads
    size_t pieces = kv_bytes / PAIR, first = (size_t)blockIdx.x;
    for (int t = 0; t < steps + 1; t++) {
      if (t) wait(address(loaded), (t - 1) & 1);
      if (t == steps) break;
      expect(address(loaded), PAIR);
      asm volatile(
          "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(address(keys)),
          "l"(kv + (first + (size_t)t * gridDim.x) % pieces * PAIR), "r"(PAIR), "r"(address(loaded))
          : "memory");
    }
  }
  __syncthreads();
  asm volatile("barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;" ::: "memory");
}

template <int CLUSTER, int ROWS, bool BULK, bool KV>
void run(const char* kv, size_t kv_bytes, int piece, float* out) {
  auto kernel = exchange<CLUSTER, ROWS, BULK, KV>;
  int share = ROWS * COLUMNS * VECTOR / CLUSTER / 16 * 16;
  int shared = (STAGES + 1) * CLUSTER * share + (KV ? ROWS * COLUMNS * VECTOR : 0);
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
  cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {CLUSTER, 1, 1};
  cudaLaunchConfig_t config = {};
  config.blockDim = 256;
  config.dynamicSmemBytes = shared;
  config.attrs = &attribute;
  config.numAttrs = 1;
  config.gridDim = CLUSTER;
  int clusters = 0;
  cudaOccupancyMaxActiveClusters(&clusters, kernel, &config);
  config.gridDim = CLUSTER * clusters;
  long rows = 252L * 630;
  int steps = (rows + CLUSTER * clusters * ROWS - 1) / (CLUSTER * clusters * ROWS);
  cudaEvent_t a, b;
  cudaEventCreate(&a);
  cudaEventCreate(&b);
  float best = 1e9;
  for (int r = 0; r < 6; r++) {
    cudaEventRecord(a);
    cudaLaunchKernelEx(&config, kernel, kv, kv_bytes, steps, piece, out);
    cudaEventRecord(b);
    cudaEventSynchronize(b);
    float ms;
    cudaEventElapsedTime(&ms, a, b);
    if (r) best = ms < best ? ms : best;
  }
  double sent = (double)steps * CLUSTER * clusters * CLUSTER * share;
  auto e = cudaGetLastError();
  printf("clusters of %2d: %2d at once, %3d blocks, %d key rows a step, %s%s %5d bytes a piece: %.2f ms, %.2f TB/s %s\n", CLUSTER,
         clusters, CLUSTER * clusters, ROWS, BULK ? "bulk copies" : "st.async   ", KV ? " + K, V" : "       ", piece, best,
         sent / best / 1e9, e ? cudaGetErrorString(e) : "");
  fflush(stdout);
}

int main() {
  int gpus = 0;
  if (cudaGetDeviceCount(&gpus) != cudaSuccess || gpus == 0) {
    fprintf(stderr, "there is no NVIDIA GPU here\n");
    return 2;
  }
  size_t bytes = 201ull << 20;
  char* kv;
  float* out;
  cudaMalloc(&kv, bytes);
  cudaMalloc(&out, 4);
  cudaMemset(kv, 1, bytes);
  run<2, 1, true, false>(kv, bytes, 1 << 20, out);
  run<4, 1, true, false>(kv, bytes, 1 << 20, out);
  run<8, 1, true, false>(kv, bytes, 1 << 20, out);
  run<8, 2, true, false>(kv, bytes, 1 << 20, out);
  run<8, 2, true, false>(kv, bytes, 512, out);
  run<8, 2, true, false>(kv, bytes, 128, out);
  run<8, 2, false, false>(kv, bytes, 16, out);
  run<8, 2, true, true>(kv, bytes, 1 << 20, out);
  run<8, 2, false, true>(kv, bytes, 16, out);
  run<16, 2, true, false>(kv, bytes, 1 << 20, out);
  run<16, 2, true, true>(kv, bytes, 1 << 20, out);
  run<16, 2, false, true>(kv, bytes, 16, out);
}
