"""From images and questions to attention statistics."""
