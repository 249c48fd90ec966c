"""Benchmarks: ours beside every peer, in one process, in interleaved rounds. Run from the root of the repository:

python -m benchmarks.run --quick
python -m pytest benchmarks/bench_attention.py --benchmark-json=attention.json
python -m benchmarks.report attention.json
"""
