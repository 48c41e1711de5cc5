// Package docs tests that the documents of the repository point at each other
// correctly.
package docs
