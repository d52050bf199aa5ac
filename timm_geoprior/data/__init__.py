"""What a training reads: image folders through timm, or a small-image set held in memory."""
