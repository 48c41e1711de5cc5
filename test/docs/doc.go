// Package docs tests the documents of the repository: that links between them have a
// target, that flags are written one way, and that quoted messages are those of the
// code.
package docs
