package store_test

import (
	"io"
	"os"
	"testing"

	"github.com/renewd/renewd/internal/server/store"
)

// TestTemporary: a temporary store is a complete store, and its file has no name.
func TestTemporary(t *testing.T) {
	dir := t.TempDir()
	t.Setenv("TMPDIR", dir)
	s, err := store.OpenTemporary(store.Options{TrustDomain: td})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { closed(t, s) })
	if files, err := os.ReadDir(dir); err != nil || len(files) > 0 {
		t.Errorf("files %v, %v", files, err)
	}
	d := s.Deployment("default")
	fill(t, d)
	if all, err := d.Entries(t.Context()); err != nil || len(all) != 100 {
		t.Errorf("%d entries, %v", len(all), err)
	}
	if size, err := s.Backup(t.Context(), io.Discard); err != nil || size == 0 {
		t.Errorf("copy of %d bytes, %v", size, err)
	}
}
