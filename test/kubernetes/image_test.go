package kubernetes

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"os"
	"path"
	"runtime"
	"slices"
)

// image is a container image made from files, as "FROM scratch" makes one.
type image struct {
	ref        string            // with registry and tag
	files      map[string]string // path in the image, without a leading slash: file on this machine
	dirs       map[string]int64  // folder in the image: mode
	user       int               // who runs it, and owns the folders
	entrypoint []string
}

// write makes the archive that "docker save" would make.
func (i image) write(name string) error {
	layer, err := i.layer()
	if err != nil {
		return fmt.Errorf("image %s: %w", i.ref, err)
	}
	config, err := json.Marshal(map[string]any{
		"architecture": runtime.GOARCH,
		"os":           "linux",
		"config":       map[string]any{"Entrypoint": i.entrypoint, "User": fmt.Sprintf("%d:%[1]d", i.user)},
		"rootfs":       map[string]any{"type": "layers", "diff_ids": []string{"sha256:" + digest(layer)}},
	})
	if err != nil {
		return err
	}
	configName := digest(config) + ".json"
	manifest, err := json.Marshal([]map[string]any{{
		"Config": configName, "RepoTags": []string{i.ref}, "Layers": []string{"layer.tar"},
	}})
	if err != nil {
		return err
	}
	var out bytes.Buffer
	w := tar.NewWriter(&out)
	for _, f := range []struct {
		name string
		data []byte
	}{{configName, config}, {"layer.tar", layer}, {"manifest.json", manifest}} {
		if err := add(w, &tar.Header{Name: f.name, Mode: 0o644}, f.data); err != nil {
			return err
		}
	}
	if err := w.Close(); err != nil {
		return err
	}
	return os.WriteFile(name, out.Bytes(), 0o644)
}

func (i image) layer() ([]byte, error) {
	var out bytes.Buffer
	w := tar.NewWriter(&out)
	parents := make(map[string]bool)
	var names []string
	for name := range i.dirs {
		names = append(names, name)
	}
	slices.Sort(names)
	for _, name := range names {
		for _, parent := range ancestors(name) {
			if !parents[parent] {
				parents[parent] = true
				if err := add(w, &tar.Header{Typeflag: tar.TypeDir, Name: parent + "/", Mode: 0o755}, nil); err != nil {
					return nil, err
				}
			}
		}
		h := &tar.Header{Typeflag: tar.TypeDir, Name: name + "/", Mode: i.dirs[name], Uid: i.user, Gid: i.user}
		if err := add(w, h, nil); err != nil {
			return nil, err
		}
	}
	for name, file := range i.files {
		data, err := os.ReadFile(file)
		if err != nil {
			return nil, err
		}
		if err := add(w, &tar.Header{Name: name, Mode: 0o755}, data); err != nil {
			return nil, err
		}
	}
	return out.Bytes(), w.Close()
}

// ancestors returns the folders above a path, the outermost first.
func ancestors(name string) []string {
	var out []string
	for dir := path.Dir(name); dir != "."; dir = path.Dir(dir) {
		out = append([]string{dir}, out...)
	}
	return out
}

func add(w *tar.Writer, h *tar.Header, data []byte) error {
	h.Size = int64(len(data))
	if err := w.WriteHeader(h); err != nil {
		return err
	}
	_, err := w.Write(data)
	return err
}

func digest(data []byte) string {
	sum := sha256.Sum256(data)
	return hex.EncodeToString(sum[:])
}
