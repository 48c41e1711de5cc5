package clitest

import (
	"flag"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/renewd/renewd/internal/config"
)

var update = flag.Bool("update", false, "write the document that the test compares")

// Document compares a file in the folder docs with what the code says.
func Document(t *testing.T, name, want string) {
	file := filepath.Join("..", "..", "docs", name)
	if *update {
		if err := os.WriteFile(file, []byte(want), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	have, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if string(have) != want {
		t.Errorf("%s differs from the code; run this test with -update", file)
	}
}

// Covers checks that a table of fields and its struct have the same fields.
func Covers[C any](t *testing.T, fields []config.Field[C]) {
	cfg := new(C)
	rows := map[uintptr]string{}
	for i := range fields {
		f := &fields[i]
		p := reflect.ValueOf(f.Value(cfg)).Pointer()
		if other, dup := rows[p]; dup {
			t.Errorf("%s and %s are the same field", f.Path, other)
		}
		rows[p] = f.Path
		if !strings.HasSuffix(f.Doc, ".") {
			t.Errorf("%s: documentation %q", f.Path, f.Doc)
		}
	}
	v := reflect.ValueOf(cfg).Elem()
	for i := range v.NumField() {
		if _, ok := rows[v.Field(i).Addr().Pointer()]; !ok {
			t.Errorf("%s has no row", v.Type().Field(i).Name)
		}
	}
	if len(rows) != v.NumField() {
		t.Errorf("%d rows for %d fields", len(rows), v.NumField())
	}
}
