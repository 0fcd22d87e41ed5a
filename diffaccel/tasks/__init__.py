"""Tasks on images: conditions that are degradations of the images, or companions of them."""
