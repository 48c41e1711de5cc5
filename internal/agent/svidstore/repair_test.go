package svidstore_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/renewd/renewd/cache"
)

// A missing file is written again within seconds of when that is possible, and not only
// at the next renewal of the SVID.
func TestFollowRestoresTheFolder(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dir := memoryDir(t)
		d := open(t, dir, discard())
		c := cache.New(cache.Config{})
		_, s := addEntry(c, time.Now())
		defer follow(t, d, c)()
		files := func() []string {
			time.Sleep(11 * time.Second)
			synctest.Wait()
			out, _ := filepath.Glob(filepath.Join(dir, "*.json"))
			return out
		}
		renew := func() {
			next := *s
			put(t, c, &next)
		}
		renew()
		whole := files()
		if len(whole) != 1 || d.Err() != nil {
			t.Fatalf("stored %v, %v", whole, d.Err())
		}
		block := whole[0] + ".tmp"
		if err := os.MkdirAll(filepath.Join(block, "x"), 0o700); err != nil {
			t.Fatal(err)
		}
		renew()
		if got := files(); len(got) != 0 || d.Err() == nil || !strings.Contains(d.Err().Error(), "odd/entry id") || d.Holds("aa", time.Now()) {
			t.Errorf("not writable: %v, %v", got, d.Err())
		}
		if err := os.RemoveAll(block); err != nil {
			t.Fatal(err)
		}
		if got := files(); len(got) != 1 || d.Err() != nil || !d.Holds("aa", time.Now()) {
			t.Errorf("writable again: %v, %v", got, d.Err())
		}
		if err := os.RemoveAll(dir); err != nil {
			t.Fatal(err)
		}
		if got := files(); len(got) != 1 || d.Err() != nil || !d.Holds("aa", time.Now()) {
			t.Errorf("after the folder was removed: %v, %v", got, d.Err())
		}
		if err := os.RemoveAll(dir); err != nil {
			t.Fatal(err)
		}
		if err := os.Symlink(t.TempDir(), dir); err != nil { // a disk
			t.Fatal(err)
		}
		renew()
		if got := files(); len(got) != 0 || d.Err() == nil || !strings.Contains(d.Err().Error(), "tmpfs") {
			t.Errorf("with a disk in place of the folder: %v, %v", got, d.Err())
		}
	})
}
