"""PyTorch's scaled_dot_product_attention on the shapes of `bench_gpu attention`: TFLOP/s, causal, bf16.

Run it right behind `bench_gpu attention` on the same idle GPU: python3 dev/bench/sdpa.py
"""
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

REPEATS = 20


def seconds_of(run):
    """Median seconds of one call of run on the GPU."""
    run()
    times = []
    for _ in range(REPEATS):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        run()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return sorted(times)[REPEATS // 2]


def main():
    print(f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}, cuDNN {torch.backends.cudnn.version()}")
    for name, backend in (("cuDNN", SDPBackend.CUDNN_ATTENTION), ("flash", SDPBackend.FLASH_ATTENTION)):
        for head in (64, 128):
            for length in (1024, 2048, 4096, 8192):
                batch, heads = 16384 // length, 2048 // head
                q, k, v = (torch.randn(batch, heads, length, head, device="cuda", dtype=torch.bfloat16,
                                       requires_grad=True) for _ in range(3))
                gradient = torch.randn_like(q)
                with sdpa_kernel(backend):
                    def forward():
                        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
                    out = forward()
                    f = seconds_of(forward)
                    b = seconds_of(lambda: torch.autograd.grad(out, (q, k, v), gradient, retain_graph=True))
                flops = 2.0 * batch * heads * length * length * head
                print(f"{name:5}  head {head:3}  T {length:5}  B {batch:2}  heads {heads:2}   "
                      f"forward {flops / f / 1e12:6.1f}   backward {2.5 * flops / b / 1e12:6.1f}   "
                      f"both {3.5 * flops / (f + b) / 1e12:6.1f} TFLOP/s")


main()
