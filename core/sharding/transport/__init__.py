"""The collectives of the sharding engine as one seam: NCCL, gloo, memory of peers on one host, 8-bit gradients.

Way in: `transport.Transport`. Knows buffers and groups; never which parameter lies in them.
"""
