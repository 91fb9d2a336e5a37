"""The parts of `benchmarks/gpu_bench.py`: what a first run on GPUs measures, each within a share of its minutes."""
