"""The CUDA backend without a GPU: kernels run on the processor, and a stand-in for CuPy runs the array code on NumPy.

It proves what a kernel computes, not how fast a device does it, nor that the device's compiler agrees (the `cuda` step
of `.ci/run` compiles every kernel with nvcc). Where a device is there, the same tests run on it.
"""
