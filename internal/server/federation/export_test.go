package federation

// For the fuzz test.
var (
	Parse   = parse
	Marshal = marshal
)
