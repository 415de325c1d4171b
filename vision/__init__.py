"""Small vision models: backbones, detection, mining, distillation, face quality."""
