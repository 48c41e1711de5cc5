// Package build tests that whoever builds the same sources gets the same programs.
package build

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// Two builds in two folders are equal, byte for byte: a program can be checked against
// its sources.
func TestBuildIsReproducible(t *testing.T) {
	t.Parallel()
	first, second := build(t, "first"), build(t, "second/longer")
	if first != second || strings.Count(first, "\n") != 4 {
		t.Errorf("one build made\n%sthe other\n%s", first, second)
	}
}

// build copies what is committed or about to be, builds it in that folder, and returns
// the programs with their sums.
func build(t *testing.T, folder string) string {
	t.Helper()
	const root = "../.."
	dir := filepath.Join(t.TempDir(), folder)
	list := exec.CommandContext(t.Context(), "git", "ls-files", "-z", "--cached", "--others", "--exclude-standard")
	list.Dir = root
	files, err := list.Output()
	if err != nil {
		t.Fatal(err)
	}
	for name := range bytes.SplitSeq(bytes.Trim(files, "\x00"), []byte{0}) {
		content, err := os.ReadFile(filepath.Join(root, string(name)))
		if os.IsNotExist(err) {
			continue // removed, and the removal is not committed
		}
		to := filepath.Join(dir, string(name))
		if err == nil {
			err = os.MkdirAll(filepath.Dir(to), 0o755)
		}
		if err == nil {
			err = os.WriteFile(to, content, 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	// The folder is in no repository, so the version is the Makefile's default.
	make := exec.CommandContext(t.Context(), "make", "build")
	make.Dir = dir
	if out, err := make.CombinedOutput(); err != nil {
		t.Fatalf("make build: %v\n%s", err, out)
	}
	programs, err := os.ReadDir(filepath.Join(dir, "bin"))
	if err != nil {
		t.Fatal(err)
	}
	var sums strings.Builder
	for _, p := range programs {
		content, err := os.ReadFile(filepath.Join(dir, "bin", p.Name()))
		if err != nil {
			t.Fatal(err)
		}
		fmt.Fprintf(&sums, "%s %x\n", p.Name(), sha256.Sum256(content))
	}
	return sums.String()
}
