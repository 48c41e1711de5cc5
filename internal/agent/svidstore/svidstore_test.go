package svidstore_test

import (
	"bytes"
	"encoding/base64"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/renewd/renewd/cache"
	"github.com/renewd/renewd/internal/agent/svidstore"
)

func TestOpenRefusesADisk(t *testing.T) {
	if dir := t.TempDir(); !strings.HasPrefix(dir, "/dev/shm") {
		_, err := svidstore.Open(dir, discard())
		if err == nil || !strings.Contains(err.Error(), "tmpfs") {
			t.Errorf("Open(%s) on a disk: %v, want an error that names tmpfs", dir, err)
		}
	}
}

func TestRestart(t *testing.T) {
	now := time.Now()
	path := memoryDir(t)
	dir := open(t, path, discard())
	c := cache.New(cache.Config{})
	e, s := addEntry(c, now)
	put(t, c, s)
	follow(t, dir, c)()
	files, _ := filepath.Glob(path + "/*")
	if len(files) != 1 {
		t.Fatalf("files stored: %v, want one", files)
	}
	if st, err := os.Stat(files[0]); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("file mode %v, %v; want 0600", st.Mode(), err)
	}

	entries, svids, err := dir.Load(now)
	if err != nil || len(entries) != 1 || len(svids) != 1 {
		t.Fatalf("Load: %d entries, %d SVIDs, %v", len(entries), len(svids), err)
	}
	again := cache.New(cache.Config{})
	again.Update(entries, nil)
	put(t, again, svids[0])
	got, _ := again.Item(e.ID)
	if got.Entry.SPIFFEID != e.SPIFFEID || got.Entry.Hint != e.Hint || got.Entry.Selectors[0] != e.Selectors[0] ||
		got.Entry.FederatesWith[0] != e.FederatesWith[0] || !got.Entry.CreatedAt.Equal(e.CreatedAt) {
		t.Errorf("entry %+v came back as %+v", e, got.Entry)
	}
	if !bytes.Equal(got.SVID.Leaf, s.Leaf) || string(got.SVID.Intermediates)+string(got.SVID.Key) != "\x02\x03" || got.SVID.ID != s.ID || got.SVID.Authority != "aa" ||
		!got.SVID.NotAfter.Equal(s.NotAfter) || !got.SVID.RenewAt.Equal(s.RenewAt) {
		t.Errorf("SVID %+v came back as %+v", s, got.SVID)
	}

	c.Update(nil, []string{e.ID})
	follow(t, dir, c)()
	if entries, _, _ := dir.Load(now); len(entries) != 0 {
		t.Error("a deleted entry's SVID is still stored")
	}
}

func TestInvalidAndExpiredFilesAreRemoved(t *testing.T) {
	now := time.Now()
	path := memoryDir(t)
	var log strings.Builder
	dir := open(t, path, logTo(&log))
	c := cache.New(cache.Config{})
	_, s := addEntry(c, now)
	put(t, c, s)
	follow(t, dir, c)()
	if err := os.WriteFile(path+"/broken.json", []byte(`{"svid":{"key":"c2VjcmV0`), 0o600); err != nil {
		t.Fatal(err)
	}
	if entries, _, err := dir.Load(now); err != nil || len(entries) != 1 {
		t.Errorf("with an invalid file: %d entries, %v; want 1", len(entries), err)
	}
	if !strings.Contains(log.String(), "broken.json") || strings.Contains(log.String(), "c2VjcmV0") {
		t.Errorf("the log must name the file and not its content:\n%s", log.String())
	}
	if entries, _, err := dir.Load(now.Add(2 * time.Hour)); err != nil || len(entries) != 0 {
		t.Errorf("after the expiry: %d entries, %v; want none", len(entries), err)
	}
	if files, _ := filepath.Glob(path + "/*"); len(files) != 0 {
		t.Errorf("files left: %v", files)
	}
}

// Holds is about the files, not the cache: a restart would find what is in a file.
func TestHoldsUntilTheFileIsReplaced(t *testing.T) {
	now := time.Now()
	path := memoryDir(t)
	dir := open(t, path, discard())
	c := cache.New(cache.Config{})
	e, s := addEntry(c, now)
	put(t, c, s)
	follow(t, dir, c)()
	renewed := *s
	renewed.Authority, renewed.NotAfter = "bb", s.NotAfter.Add(time.Hour)
	put(t, c, &renewed)
	if !dir.Holds("aa", now) || dir.Holds("bb", now) {
		t.Error("before the file was replaced: must hold the old authority's SVID alone")
	}
	follow(t, dir, c)()
	if dir.Holds("aa", now) || !dir.Holds("bb", now) {
		t.Error("after the file was replaced: must hold the new authority's SVID alone")
	}

	again := open(t, path, discard())
	if _, _, err := again.Load(now); err != nil || !again.Holds("bb", now) {
		t.Errorf("after a restart (%v): must hold what was loaded", err)
	}
	c.Update(nil, []string{e.ID})
	follow(t, again, c)()
	if again.Holds("bb", now) {
		t.Error("holds the SVID of a deleted entry")
	}
}

// If the new SVID cannot be written, a restart must not find the old one.
func TestOldSVIDIsRemovedIfTheNewOneCannotBeWritten(t *testing.T) {
	now := time.Now()
	path := memoryDir(t)
	dir := open(t, path, discard())
	c := cache.New(cache.Config{})
	_, s := addEntry(c, now)
	put(t, c, s)
	follow(t, dir, c)()
	files, _ := filepath.Glob(path + "/*.json")
	if len(files) != 1 {
		t.Fatalf("files: %v, want one", files)
	}
	if err := os.MkdirAll(files[0]+".tmp/x", 0o700); err != nil { // makes the write fail
		t.Fatal(err)
	}
	renewed := *s
	renewed.Authority, renewed.NotAfter = "bb", s.NotAfter.Add(time.Hour)
	put(t, c, &renewed)
	follow(t, dir, c)()
	if _, err := os.Stat(files[0]); !os.IsNotExist(err) || dir.Holds("aa", now) || dir.Holds("bb", now) {
		t.Errorf("the old SVID is still there (%v)", err)
	}
}

func FuzzLoad(f *testing.F) {
	der := base64.StdEncoding.EncodeToString(leaf(spiffeid.RequireFromString("spiffe://a/b")))
	f.Add([]byte(`{"id":"e","spiffe_id":"spiffe://a/b","selectors":[{"Type":"a","Value":"b"}],"svid":{"leaf":"` + der + `","key":"AA==","authority":"x"}}`))
	f.Add([]byte(`{}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		path := memoryDir(t)
		dir := open(t, path, discard())
		if err := os.WriteFile(path+"/x.json", data, 0o600); err != nil {
			t.Fatal(err)
		}
		entries, svids, err := dir.Load(time.Unix(-1<<40, 0))
		if err != nil {
			t.Fatal(err)
		}
		for i, e := range entries {
			c := cache.New(cache.Config{})
			c.Update([]*cache.Entry{e}, nil)
			if svids[i].For(e) && svids[i].ID == e.SPIFFEID && c.Put(svids[i]) != nil {
				t.Error("what was loaded does not fit the cache")
			}
		}
	})
}

// A partial file, left by a crash or a full file system, has a key and takes space that
// other files need.
func TestPartialFilesAreRemoved(t *testing.T) {
	now := time.Now()
	path := memoryDir(t)
	dir := open(t, path, discard())
	if err := os.WriteFile(path+"/gone.json.tmp", []byte("a key"), 0o600); err != nil {
		t.Fatal(err)
	}
	c := cache.New(cache.Config{})
	_, s := addEntry(c, now)
	put(t, c, s)
	follow(t, dir, c)()
	files, _ := filepath.Glob(path + "/*")
	if len(files) != 1 || !strings.HasSuffix(files[0], ".json") {
		t.Errorf("files: %v, want that of the entry alone", files)
	}
}

// A changed entry is stored before its SVID is renewed: after a restart no workload
// matches the selectors from before.
func TestChangedEntryIsStored(t *testing.T) {
	path := memoryDir(t)
	synctest.Test(t, func(t *testing.T) {
		now := time.Now()
		dir := open(t, path, discard())
		c := cache.New(cache.Config{})
		e, s := addEntry(c, now)
		put(t, c, s)
		stop := follow(t, dir, c)
		synctest.Wait() // it is stored
		changed := *e
		changed.Revision++
		changed.Selectors = []cache.Selector{{Type: "unix", Value: "uid:2"}}
		changed.X509TTL = time.Hour
		c.Update([]*cache.Entry{&changed}, nil)
		stop()
		entries, svids, err := dir.Load(now)
		if err != nil || len(entries) != 1 || entries[0].Selectors[0].Value != "uid:2" {
			t.Fatalf("Load: %+v, %v; want the changed entry", entries, err)
		}
		if svids[0].For(entries[0]) || !svids[0].For(e) {
			t.Error("the SVID is not that of the entry before the change")
		}
	})
}

// A file may have an SVID and an entry with another SPIFFE ID, after the entry was
// edited. That SVID is not served.
func TestSVIDOfAnotherSPIFFEIDIsNotServed(t *testing.T) {
	now := time.Now()
	path := memoryDir(t)
	dir := open(t, path, discard())
	c := cache.New(cache.Config{})
	e, s := addEntry(c, now)
	put(t, c, s)
	follow(t, dir, c)()
	files, _ := filepath.Glob(path + "/*.json")
	data, err := os.ReadFile(files[0])
	if err != nil {
		t.Fatal(err)
	}
	data = bytes.Replace(data, []byte(e.SPIFFEID.String()), []byte("spiffe://example.org/web"), 1)
	if err := os.WriteFile(files[0], data, 0o600); err != nil {
		t.Fatal(err)
	}
	entries, svids, err := dir.Load(now)
	if err != nil || len(entries) != 1 || entries[0].SPIFFEID.Path() != "/web" || svids[0].ID != e.SPIFFEID {
		t.Fatalf("Load: %+v, %+v, %v; want both as they are", entries, svids, err)
	}
	again := cache.New(cache.Config{})
	again.Restore(entries, svids, nil)
	if again.Held("aa") > 0 {
		t.Error("the SVID is held for the entry")
	}
	follow(t, dir, again)()
	if files, _ := filepath.Glob(path + "/*"); len(files) > 0 || dir.Holds("aa", now) {
		t.Errorf("it is still stored: %v", files)
	}
}

// The owner of the folder can replace the keys in it.
func TestOpenRefusesTheFolderOfAnotherUser(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("only root can give a folder away")
	}
	path := memoryDir(t)
	if err := os.Chown(path, 54321, 54321); err != nil {
		t.Fatal(err)
	}
	if _, err := svidstore.Open(path, discard()); err == nil || !strings.Contains(err.Error(), "54321") {
		t.Errorf("got %v, want an error that names the owner", err)
	}
}
