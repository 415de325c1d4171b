"""llama.cpp as the other verifier, through llama-cpp-python (extra ``gguf``): GGUF files beyond the native layers."""
