"""Mathematics without graphs: GPTQ for MX formats, Hadamard constructions, block transforms."""
