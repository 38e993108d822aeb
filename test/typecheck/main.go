// Command typecheck checks the types of packages, without their tests, for an architecture
// that is not this one. It reads what they import, too, and compiles nothing: that takes seconds
// where go vet first builds everything below for that architecture.
package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"go/types"
	"io"
	"os"
	"os/exec"
	"path/filepath"
)

func main() {
	if len(os.Args) < 3 {
		fmt.Fprintln(os.Stderr, "usage: typecheck ARCHITECTURE PACKAGE...")
		os.Exit(2)
	}
	if err := check(os.Args[1], os.Args[2:]); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

// source is what go list says of a package.
type source struct {
	ImportPath, Dir string
	GoFiles         []string
	ImportMap       map[string]string // imports that mean another path
	DepOnly         bool
}

func check(arch string, patterns []string) error {
	list := exec.Command("go", append([]string{"list", "-deps", "-json=ImportPath,Dir,GoFiles,ImportMap,DepOnly", "--"}, patterns...)...)
	list.Env = append(os.Environ(), "GOARCH="+arch, "CGO_ENABLED=0")
	list.Stderr = os.Stderr
	out, err := list.Output()
	if err != nil {
		return fmt.Errorf("go list: %w", err)
	}
	files, done := token.NewFileSet(), map[string]*types.Package{"unsafe": types.Unsafe}
	var errs []error
	for d := json.NewDecoder(bytes.NewReader(out)); ; { // dependencies come first
		var s source
		if err := d.Decode(&s); errors.Is(err, io.EOF) {
			return errors.Join(errs...)
		} else if err != nil {
			return err
		}
		if s.ImportPath == "unsafe" {
			continue
		}
		var parsed []*ast.File
		for _, name := range s.GoFiles {
			f, err := parser.ParseFile(files, filepath.Join(s.Dir, name), nil, parser.SkipObjectResolution)
			if err != nil {
				return err
			}
			parsed = append(parsed, f)
		}
		c := types.Config{
			Sizes:            types.SizesFor("gc", arch),
			IgnoreFuncBodies: s.DepOnly,
			Importer: importer(func(path string) (*types.Package, error) {
				if other := s.ImportMap[path]; other != "" {
					path = other
				}
				return done[path], nil
			}),
			Error: func(err error) { errs = append(errs, fmt.Errorf("%s: %w", arch, err)) },
		}
		done[s.ImportPath], _ = c.Check(s.ImportPath, files, parsed, nil) // Error has them
	}
}

type importer func(path string) (*types.Package, error)

func (i importer) Import(path string) (*types.Package, error) { return i(path) }
