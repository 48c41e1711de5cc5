// Package tree finds the files and packages of the repository, for tests that check how
// they are written.
package tree

import (
	"bytes"
	"encoding/json"
	"io/fs"
	"os"
	"os/exec"
	"path"
	"slices"
	"testing"
)

// Module is the path of the module.
const Module = "github.com/renewd/renewd"

// FS are the files below root, the path to the repository.
func FS(root string) fs.FS { return os.DirFS(root) }

// Files returns the files in root that have one of the extensions, without those of git
// and what make builds.
func Files(t testing.TB, root fs.FS, extensions ...string) (files []string) {
	t.Helper()
	err := fs.WalkDir(root, ".", func(file string, d fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case d.IsDir() && (d.Name() == ".git" || d.Name() == "bin"):
			return fs.SkipDir
		case !d.IsDir() && slices.Contains(extensions, path.Ext(file)):
			files = append(files, file)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return files
}

// Read returns the content of a file in root.
func Read(t testing.TB, root fs.FS, file string) string {
	t.Helper()
	content, err := fs.ReadFile(root, file)
	if err != nil {
		t.Fatal(err)
	}
	return string(content)
}

// Package is a package as go list shows it, without its tests.
type Package struct {
	ImportPath, Dir, Export string
	GoFiles, Imports, Deps  []string
}

// Packages returns the packages of the module in folder dir. With flag -deps it returns
// those that they depend on, too.
func Packages(t testing.TB, dir string, flags ...string) (all []Package) {
	t.Helper()
	args := append([]string{"list", "-json=ImportPath,Dir,Export,GoFiles,Imports,Deps"}, flags...)
	cmd := exec.CommandContext(t.Context(), "go", append(args, "./...")...)
	cmd.Dir, cmd.Stderr = dir, os.Stderr
	out, err := cmd.Output()
	for dec := json.NewDecoder(bytes.NewReader(out)); err == nil && dec.More(); {
		var p Package
		err = dec.Decode(&p)
		all = append(all, p)
	}
	if err != nil {
		t.Fatalf("go list: %v", err)
	}
	return all
}
