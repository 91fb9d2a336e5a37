"""Comparison with outputs recorded from upstream: `scldm parity DIR`, as a library.

A folder holds cases, each a pair NAME.safetensors and NAME.json. The kind of a case is recognised by its contents,
never by its name; every recorded number is compared, listed as a known fault of upstream with the reason, or reported
as not understood.
"""
