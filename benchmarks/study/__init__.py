"""The study: what choosing layers is worth on a real model, one factor at a time.

`python -m benchmarks.study` repeats it, in slices if need be, and writes its page.
"""
