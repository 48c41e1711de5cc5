// Package mutants checks the list of mutants that no test of their package kills.
//
// A mutant is the code with one operator changed. "make mutate" makes them with gremlins,
// one at a time, and runs the tests of their package: tests that pass with the code broken
// check nothing there. This package compares the reports with survivors.txt, which gives
// for each survivor the reason why it does not matter. In CI, without reports, it checks
// only that the list matches the code.
package mutants
