// Package kubernetes tests the programs in a real cluster of one node.
package kubernetes
