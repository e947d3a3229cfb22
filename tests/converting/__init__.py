"""States of averages in the formats of other packages."""
