package svidstore_test

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/renewd/renewd/cache"
)

// usesAfterRestart returns the uses that an agent would load if it started now.
func usesAfterRestart(t *testing.T, path string, life func(cache.Process) cache.Life) map[cache.Process][]cache.Use {
	t.Helper()
	d := open(t, path, discard())
	uses, err := d.LoadProcesses(time.Now(), life)
	if err != nil {
		t.Fatal(err)
	}
	return uses
}

func processFiles(path string) []string {
	files, _ := filepath.Glob(filepath.Join(path, "*.process*"))
	return files
}

// After a kill at any time a restarted agent knows what a process may use. It forgets
// what the process no longer uses.
func TestProcessRecordsFollowTheCache(t *testing.T) {
	path := memoryDir(t)
	synctest.Test(t, func(t *testing.T) {
		now := time.Now()
		d := open(t, path, discard())
		c := cache.New(cache.Config{})
		c.Restore(nil, nil, nil)
		e, s := addEntry(c, now)
		put(t, c, s)
		stop := follow(t, d, c)
		p := cache.Process{PID: 7, Started: 99}
		sub := c.Subscribe(p, e.Selectors)
		c.SetBundle(snapshot(t))
		answer := func() {
			sub.View()
			d.Record(p, sub.Sending())
		}
		answer()
		want := func(when string, authorities ...string) {
			t.Helper()
			var got []string
			for _, u := range usesAfterRestart(t, path, running)[p] {
				got = append(got, u.Authority)
			}
			if slices.Sort(got); !slices.Equal(got, authorities) {
				t.Errorf("%s: a restart finds uses of %v, want %v", when, got, authorities)
			}
		}
		want("sent", "aa")
		sub.Read()
		next := *s
		next.Authority = "bb"
		put(t, c, &next)
		answer()
		want("replacement sent", "aa", "bb")
		sub.Read()
		time.Sleep(11 * time.Second)
		want("replacement read", "bb")
		sub.Close()
		time.Sleep(11 * time.Second)
		want("the stream has ended", "bb")
		c.Sweep(func(cache.Process) cache.Life { return cache.Ended })
		time.Sleep(11 * time.Second)
		want("the process has ended")
		d.Record(p, []cache.Use{{Authority: "bb", NotAfter: now.Add(time.Hour)}})
		if got := usesAfterRestart(t, path, func(cache.Process) cache.Life { return cache.Ended }); len(got) != 0 {
			t.Errorf("after the process has ended: %v", got)
		}
		if files := processFiles(path); len(files) != 0 {
			t.Errorf("files left: %v", files)
		}
		stop()
	})
}

// Uses are merged, other users cannot read a record, and invalid records are removed and
// logged.
func TestProcessRecords(t *testing.T) {
	path := memoryDir(t)
	var log strings.Builder
	d := open(t, path, logTo(&log))
	end := time.Now().Add(time.Hour)
	p := cache.Process{PID: 7, Started: 99}
	d.Record(p, []cache.Use{{Authority: "aa", NotAfter: end}})
	files := processFiles(path)
	if len(files) != 1 {
		t.Fatalf("files %v, want one", files)
	}
	if st, err := os.Stat(files[0]); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v; want 0600", st.Mode(), err)
	}
	d.Record(p, []cache.Use{{Authority: "aa", NotAfter: end.Add(-time.Minute)}, {Authority: "bb", NotAfter: end}})
	got := usesAfterRestart(t, path, running)[p]
	if len(got) != 2 || got[0].Authority != "aa" || !got[0].NotAfter.Equal(end) || got[1].Authority != "bb" {
		t.Errorf("stored %v, want both, aa until the later expiry", got)
	}
	good, err := os.ReadFile(files[0])
	if err != nil {
		t.Fatal(err)
	}
	for name, content := range map[string]string{"1-2.process": "{", "3-4.process": string(good), "5-6.process.tmp": string(good)} {
		if err := os.WriteFile(filepath.Join(path, name), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	again := open(t, path, logTo(&log))
	if got, err := again.LoadProcesses(time.Now(), running); err != nil || len(got) != 1 {
		t.Errorf("with invalid files: %v, %v", got, err)
	}
	if files := processFiles(path); len(files) != 1 || !strings.Contains(log.String(), "1-2.process") || !strings.Contains(log.String(), "3-4.process") {
		t.Errorf("files %v; the log must name those removed:\n%s", files, log.String())
	}
	if got, err := again.LoadProcesses(end, running); err != nil || len(got) != 0 || len(processFiles(path)) != 0 {
		t.Errorf("after the expiry: %v, %v", got, err)
	}
}

// A failed write of a record is logged once and retried until it succeeds.
func TestRecordIsRetried(t *testing.T) {
	path := memoryDir(t)
	synctest.Test(t, func(t *testing.T) {
		var log strings.Builder
		d := open(t, path, logTo(&log))
		c := cache.New(cache.Config{})
		e, s := addEntry(c, time.Now())
		put(t, c, s)
		c.SetBundle(snapshot(t))
		stop := follow(t, d, c)
		p := cache.Process{PID: 7, Started: 99}
		sub := c.Subscribe(p, e.Selectors)
		synctest.Wait()
		if err := os.RemoveAll(path); err != nil {
			t.Fatal(err)
		}
		sub.View()
		uses := sub.Sending()
		d.Record(p, uses)
		d.Record(p, uses)
		if d.Err() == nil {
			t.Error("no error after a failed write")
		}
		time.Sleep(11 * time.Second)
		if got := usesAfterRestart(t, path, running)[p]; d.Err() != nil || len(got) != 1 {
			t.Errorf("seconds later %v is stored, %v", got, d.Err())
		}
		if err := os.RemoveAll(path); err != nil {
			t.Fatal(err)
		}
		time.Sleep(11 * time.Second)
		if got := usesAfterRestart(t, path, running)[p]; len(got) != 1 {
			t.Errorf("seconds after the folder was removed %v is stored", got)
		}
		stop()
		if n := strings.Count(log.String(), "process record not stored"); n != 1 || strings.Count(log.String(), "storing process records recovered") != 1 {
			t.Errorf("%d failures logged, want one:\n%s", n, log.String())
		}
	})
}

// During a write of an SVID's file a restart could find the SVID before or the new one,
// even if the cache has another one by then.
func TestHoldsDuringAWrite(t *testing.T) {
	path := memoryDir(t)
	now := time.Now()
	d := open(t, path, discard())
	c := cache.New(cache.Config{})
	_, s := addEntry(c, now)
	put(t, c, s)
	follow(t, d, c)()
	files, _ := filepath.Glob(path + "/*.json")
	if len(files) != 1 {
		t.Fatalf("files: %v, want one", files)
	}
	before, err := os.Stat(files[0])
	if err != nil {
		t.Fatal(err)
	}
	stop := follow(t, d, c)
	deadline := time.Now().Add(10 * time.Second)
	for time.Now().Before(deadline) { // until Follow has written it at its start
		if now, err := os.Stat(files[0]); err == nil && !os.SameFile(before, now) {
			break
		}
		time.Sleep(time.Millisecond)
	}
	// A write into a FIFO waits for its reader.
	if err := syscall.Mkfifo(files[0]+".tmp", 0o600); err != nil {
		t.Fatal(err)
	}
	renew := func(authority string) {
		next := *s
		next.Authority = authority
		put(t, c, &next)
	}
	renew("bb")
	for !d.Holds("bb", now) && time.Now().Before(deadline) {
		time.Sleep(time.Millisecond)
	}
	renew("cc")
	if !d.Holds("aa", now) || !d.Holds("bb", now) {
		t.Errorf("while bb is written over aa: holds aa %v and bb %v, want both", d.Holds("aa", now), d.Holds("bb", now))
	}
	if d.Holds("aa", s.NotAfter) {
		t.Error("an expired SVID is held")
	}
	r, err := os.Open(files[0] + ".tmp")
	if err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 1<<16)
	for n := 1; n > 0; n, _ = r.Read(buf) {
	}
	r.Close()
	for d.Holds("bb", now) && time.Now().Before(deadline) {
		time.Sleep(time.Millisecond)
	}
	if d.Holds("aa", now) || d.Holds("bb", now) || !d.Holds("cc", now) {
		t.Error("in the end it must hold cc alone")
	}
	stop()
}
