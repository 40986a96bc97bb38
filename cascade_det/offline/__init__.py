"""Detection in very many images, by several processes or machines, in parts that can be resumed."""
