"""What only Kafka can do wrong: rights, sizes, deleted topics, brokers in trouble, logging in."""
