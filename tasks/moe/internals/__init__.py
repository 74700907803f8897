"""Everything that relies on what transformers does not document; test_internals_contract.py tests each assumption."""
