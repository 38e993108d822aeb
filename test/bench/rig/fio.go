package rig

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

// Fio goes through sections of a job file one after the other (each says
// "stonewall"), in one process because starting it is slow in the lab, and returns
// bytes per second of each. They are direct and asynchronous unless they say
// otherwise.
func Fio(ctx context.Context, sections []string) ([]float64, error) {
	job := "[global]\nioengine=libaio\ndirect=1\nthread=1\n"
	for i, text := range sections {
		job += fmt.Sprintf("[job%d]\n%s", i, text)
	}
	dir, err := os.MkdirTemp("", "fio-")
	if err != nil {
		return nil, err
	}
	defer func() { _ = os.RemoveAll(dir) }()
	in, out := filepath.Join(dir, "job"), filepath.Join(dir, "out")
	if err := os.WriteFile(in, []byte(job), 0o600); err != nil {
		return nil, err
	}
	if _, err := Run(ctx, "fio", "--output-format=json", "--output="+out, in); err != nil {
		return nil, err
	}
	text, err := os.ReadFile(out)
	if err != nil {
		return nil, err
	}
	type counted struct {
		Bytes   float64 `json:"io_bytes"`
		Runtime float64 `json:"runtime"` // milliseconds
	}
	var said struct {
		Jobs []struct {
			Name        string `json:"jobname"`
			Error       int
			Read, Write counted
		}
	}
	// fio may print notes before the JSON.
	if err := json.Unmarshal(text[max(0, strings.IndexByte(string(text), '{')):], &said); err != nil {
		return nil, fmt.Errorf("fio's answer cannot be read: %w\n%s", err, text)
	}
	if len(said.Jobs) != len(sections) {
		return nil, fmt.Errorf("fio answered for %d jobs, not for %d:\n%s", len(said.Jobs), len(sections), text)
	}
	var rates []float64
	for i, j := range said.Jobs {
		one := j.Read
		if j.Write.Bytes > 0 {
			one = j.Write
		}
		if j.Name != fmt.Sprint("job", i) || j.Error != 0 || one.Bytes == 0 || one.Runtime == 0 {
			return nil, fmt.Errorf("fio failed with or did not measure %s (error %d):\n%s", j.Name, j.Error, sections[i])
		}
		rates = append(rates, one.Bytes/(one.Runtime/1000))
	}
	return rates, nil
}
