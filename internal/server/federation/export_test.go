package federation

// What the fuzz test needs beside the public interface.
var (
	Parse   = parse
	Marshal = marshal
)
