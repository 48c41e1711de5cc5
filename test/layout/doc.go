// Package layout tests that the packages of the module import each other as
// ARCHITECTURE.md says ("The rooms").
package layout
